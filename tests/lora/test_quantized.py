"""Adapters on a quantized pruned model, beside the same adapters on its dequantized weights."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.lora import (
    TARGETS,
    TOKENS,
    CodesParameter,
    assert_zeros,
    config,
    llama,
    logits,
    randomize,
    reference,
    relative,
    train,
    zeros_of,
)
from support.refusals import refuses
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, TorchAoConfig

from wanda_lightning.lora import KEEP_ZEROS_LORA, merge


def by_torchao(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), dtype=dtype
    )


@pytest.fixture
def folder(tmp_path):
    llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "pruned")
    return tmp_path / "pruned"


def test_training_and_merging_keep_every_zero(folder, tmp_path):
    zeros = zeros_of(AutoModelForCausalLM.from_pretrained(folder))
    model = get_peft_model(by_torchao(folder, torch.bfloat16), config())
    losses = train(model, steps=8)
    assert losses[-1] < losses[0]
    adapted = model(input_ids=TOKENS).logits.detach().float()
    merged = merge(model)
    assert all((merged.get_parameter(name) == 0)[zero].all() for name, zero in zeros.items())
    assert all(type(p) is nn.Parameter and p.dtype == torch.bfloat16 for p in merged.parameters())
    assert relative(logits(merged), adapted) < 2**-7
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_zeros(again, zeros)
    assert torch.equal(logits(again), logits(merged))


def test_gradients_are_those_of_the_dequantized_weight_which_backward_does_not_store(folder):
    model = randomize(get_peft_model(by_torchao(folder), config(target_modules=["down_proj"])))
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    x = torch.randn(3, 128, requires_grad=True)
    wanted_for = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):
        got = torch.autograd.grad(layer(x).square().sum(), wanted_for)
    assert saved
    assert not any(
        type(tensor) in (torch.Tensor, nn.Parameter) and tensor.shape == (64, 128)
        for tensor in saved
    )
    layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.dequantize())
    want = torch.autograd.grad(reference(layer, x).square().sum(), wanted_for)
    assert max(map(relative, got, want)) < 1e-5


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        (
            LoraConfig(target_modules=TARGETS),
            r"weights, but model\.layers\.0\.self_attn\.q_proj is a Torchao",
        ),
        (config(), "but lm_head is a quantized layer"),
    ],
)
def test_what_cannot_be_merged_is_named_before_anything_changes(folder, adapters, message):
    model = get_peft_model(by_torchao(folder), adapters)
    if adapters.peft_type == KEEP_ZEROS_LORA:
        with refuses(
            r"Use wanda_lightning\.lora\.merge\(model\), which dequantizes the model",
        ):
            model.merge_adapter()
    model.base_model.model.lm_head.weight = CodesParameter(
        torch.zeros(64, 64, dtype=torch.uint8), requires_grad=False
    )
    with refuses(message):
        merge(model)
    assert (
        "Int8Tensor"
        in type(model.base_model.model.model.layers[0].self_attn.q_proj.weight).__name__
    )
