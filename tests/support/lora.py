"""Small pruned models with adapters, and what they are compared with."""

import torch
from peft import get_peft_model
from support.callbacks import zeros as zeros_of
from support.layers import rng
from support.modules import tiny_llama
from support.quiet import prune
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from wanda_lightning.lora import KeepZerosLoraConfig

TOKENS = torch.randint(0, 64, (2, 12), generator=rng(1))
TARGETS = ["q_proj", "v_proj", "down_proj"]


def llama(dtype=torch.float32, sparsity=0.5, **sizes):
    sizes = {
        "vocab_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 56,
        "use_cache": False,
        **sizes,
    }
    return pruned(tiny_llama(**sizes), sparsity).to(dtype)


def gpt2(sparsity=0.5):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, use_cache=False
    )
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    return pruned(GPT2LMHeadModel(config), sparsity)


def pruned(model, sparsity):
    if sparsity:
        prune(model, None, sparsity, criterion="magnitude")
    return model


def config(**options):
    options = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **options}
    return KeepZerosLoraConfig(**options)


def randomize(model):
    """Adapters that do something: B starts at zero."""
    generator = rng()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter) * 0.2
    return model


def train(model, steps=4, lr=1e-2):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.1)
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=TOKENS).logits.float()


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def assert_zeros(model, zeros):
    assert_close(zeros_of(model), zeros)


def reference(layer, x, *, dropout_seed=None, names=("default",)):
    """Plain autograd over dense W + s (B A) * keep; with dropout on what enters the adapter."""
    base = layer.base_layer
    weight = base.weight.t() if isinstance(base, Conv1D) else base.weight
    output = F.linear(x, weight, base.bias)
    for name in names:
        a = layer.lora_A[name].weight
        b = layer.lora_B[name].weight
        delta = layer.scaling[name] * (b @ a) * (weight != 0)
        entering = x
        if dropout_seed is not None:
            torch.manual_seed(dropout_seed)
            entering = F.dropout(x, layer.lora_dropout[name].p)
        output = output + F.linear(entering, delta)
    return output


def single(layer, **options):
    model = get_peft_model(nn.Sequential(layer), config(target_modules=["0"], **options))
    return model, randomize(model).base_model.model[0]


def sparse_layer(kind, bias=True):
    torch.manual_seed(0)
    layer = Conv1D(40, 24) if kind == "conv1d" else nn.Linear(24, 40, bias=bias)
    layer.weight.data = torch.randn_like(layer.weight) * (torch.rand_like(layer.weight) > 0.5)
    return layer.double()


class CodesParameter(nn.Parameter):
    """Like bitsandbytes' Params4bit: a class of its own."""
