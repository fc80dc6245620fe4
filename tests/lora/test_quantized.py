"""Adapters on a quantized pruned model, beside the same adapters on its dequantized weights."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.lora import TARGETS, TOKENS, CodesParameter, assert_zeros, config, llama, logits, relative, train, zeros_of
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from wanda_lightning.lora import KEEP_ZEROS_LORA, merge


def by(package, make):
    """A function that loads a folder with weights quantized by a package, which may not be installed."""

    def load(folder, dtype=torch.float32):
        pytest.importorskip(package)
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=make(dtype), dtype=dtype)

    return load


def int8(dtype):
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def nf4(dtype):
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


by_torchao = by("torchao", int8)
by_bitsandbytes = by("bitsandbytes", nf4)
by_bitsandbytes_8 = by("bitsandbytes", lambda dtype: BitsAndBytesConfig(load_in_8bit=True))


def dequantized(folder, load):
    """The pruned model with weights that were quantized and dequantized by hand."""
    model, codes = AutoModelForCausalLM.from_pretrained(folder), load(folder)
    for name, parameter in model.named_parameters():
        if "proj" in name:
            parameter.data = codes.get_parameter(name).dequantize()
    return model


@pytest.fixture
def folder(tmp_path):
    llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "pruned")
    return tmp_path / "pruned"


@pytest.mark.parametrize(
    ("load", "dtype", "rounding"),
    [
        (by_torchao, torch.float32, 1e-5),
        (by_torchao, torch.bfloat16, 2**-7),
        (by_bitsandbytes, torch.float32, 1e-5),
        (by_bitsandbytes_8, torch.float32, 2**-5),  # it quantizes the inputs, too
    ],
)
def test_training_and_merging_keep_every_zero(folder, load, dtype, rounding, tmp_path):
    zeros = zeros_of(AutoModelForCausalLM.from_pretrained(folder))
    model = get_peft_model(load(folder, dtype), config())
    losses = train(model, steps=8)
    assert losses[-1] < losses[0]
    adapted = model(input_ids=TOKENS).logits.detach().float()  # in eval mode, bitsandbytes may compute in bfloat16
    merged = merge(model)
    assert all((merged.get_parameter(name) == 0)[zero].all() for name, zero in zeros.items())
    zeros = zeros_of(merged)  # nf4 adds some
    assert all(type(p) is nn.Parameter and p.dtype == dtype for p in merged.parameters())
    assert relative(logits(merged), adapted) < rounding
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_zeros(again, zeros)
    assert torch.equal(logits(again), logits(merged))


def test_training_equals_training_on_the_dequantized_weights(folder):
    trained = []
    for base in (by_torchao(folder), dequantized(folder, by_torchao)):
        torch.manual_seed(1)
        model = get_peft_model(base, config())
        train(model)
        trained.append({name: p.detach() for name, p in model.named_parameters() if "lora" in name})
    assert len(trained[0]) == 2 * 2 * len(TARGETS)
    torch.testing.assert_close(*trained, rtol=1e-3, atol=1e-5)


def test_backward_stores_no_dequantized_weight(folder):
    model = get_peft_model(by_torchao(folder), config(target_modules=["down_proj"]))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        model.base_model.model.model.layers[0].mlp.down_proj(torch.randn(3, 128))
    assert saved
    assert not any(type(tensor) in (torch.Tensor, nn.Parameter) and tensor.shape == (64, 128) for tensor in saved)


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        (LoraConfig(target_modules=TARGETS), r"weights, but model\.layers\.0\.self_attn\.q_proj is a Torchao"),
        (config(), "but lm_head is a quantized layer"),
    ],
)
def test_what_cannot_be_merged_is_named_before_anything_changes(folder, adapters, message):
    model = get_peft_model(by_torchao(folder), adapters)
    if adapters.peft_type == KEEP_ZEROS_LORA:
        with pytest.raises(ValueError, match=r"Use wanda_lightning\.lora\.merge\(model\), which dequantizes the model"):
            model.merge_adapter()
    model.base_model.model.lm_head.weight = CodesParameter(torch.zeros(64, 64, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=message):
        merge(model)
    assert "Int8Tensor" in type(model.base_model.model.model.layers[0].self_attn.q_proj.weight).__name__
