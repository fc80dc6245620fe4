"""The layer against dense autograd over W + s (B A) * keep, and PEFT's operations on it."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.lora import (
    TOKENS,
    assert_zeros,
    config,
    llama,
    logits,
    randomize,
    reference,
    relative,
    single,
    sparse_layer,
    zeros_of,
)
from torch import nn

from wanda_lightning.lora import KeepZerosLoraConfig, merge


def test_updates_below_the_last_digit_of_bfloat16_count_in_training(monkeypatch):
    layer = nn.Linear(16, 16, bias=False, dtype=torch.bfloat16)
    layer.weight.data = torch.eye(16, dtype=torch.bfloat16)
    model = get_peft_model(nn.Sequential(layer), config(target_modules=["0"], r=16, lora_alpha=16))
    model.base_model.model[0].lora_A["default"].weight.data = torch.eye(16)
    model.base_model.model[0].lora_B["default"].weight.data = delta = torch.eye(16) * 2**-12
    assert torch.equal((torch.eye(16) + delta).bfloat16(), layer.weight)  # lost in a sum
    seen, original = [], torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *args: (seen.append(args[2].float()), original(*args))[1])
    with torch.no_grad():
        model(torch.randn(3, 16, dtype=torch.bfloat16))
    assert torch.equal(seen[0], delta)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
def test_output_and_gradients_are_those_of_dense_autograd(kind, dropout):
    model, layer = single(sparse_layer(kind, bias=kind != "no bias"), lora_dropout=dropout)
    model.double()
    base = layer.base_layer.requires_grad_(not dropout)  # also of an unfrozen base
    x = torch.randn(3, 5, 24, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(3, 5, 40, dtype=torch.float64)
    wanted_for = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight, *base.parameters()]
    wanted_for = [each for each in wanted_for if each.requires_grad]

    torch.manual_seed(7)
    out = model(x)
    got = torch.autograd.grad((out * direction).sum(), wanted_for)
    expected = reference(layer, x, dropout_seed=7 if dropout else None)
    want = torch.autograd.grad((expected * direction).sum(), wanted_for)

    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_backward_keeps_nothing_of_the_size_of_the_weight(dropout):
    model, layer = single(sparse_layer("linear").float(), lora_dropout=dropout)
    x = torch.randn(7, 24, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(x)
    dense = [t for t in saved if t.numel() == 24 * 40]
    assert dense  # the hooks see the product
    assert all(t.data_ptr() == layer.base_layer.weight.data_ptr() for t in dense)


def test_options_of_lora_work_as_in_plain_lora_on_a_dense_layer():
    options = {"r": 4, "lora_alpha": 8, "use_rslora": True, "lora_bias": True, "target_modules": ["0"]}
    torch.manual_seed(0)
    dense = nn.Linear(24, 40)
    plain = randomize(get_peft_model(nn.Sequential(dense), LoraConfig(**options)))
    x = torch.randn(7, 24)
    expected = plain(x)
    plain.unload()
    model = randomize(get_peft_model(nn.Sequential(dense), KeepZerosLoraConfig(**options)))
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(merge(model)(x), expected)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_autocast_computes_in_its_dtype_and_gives_float32_gradients(dropout):
    model, layer = single(sparse_layer("linear").float(), lora_dropout=dropout)
    x = torch.randn(7, 24, requires_grad=True)
    wanted_for = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.manual_seed(7)
        out = model(x)
        got = torch.autograd.grad(out.float().square().sum(), wanted_for)  # backward inside, as some loops do
    assert out.dtype == torch.bfloat16
    expected = reference(layer, x, dropout_seed=7 if dropout else None)
    want = torch.autograd.grad(expected.square().sum(), wanted_for)
    assert relative(out.float(), expected) < 0.01
    for mine, theirs in zip(got, want, strict=True):
        assert mine.dtype == torch.float32
        assert relative(mine, theirs) < 0.02


# The old name of transformers before 5.24; the new one is not in all versions that we support.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.* is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    def gradients(checkpointing):
        model = randomize(get_peft_model(llama(), config(lora_dropout=0.2))).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(3)
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain
    torch.testing.assert_close(checkpointed, plain)


def test_adapters_switch_add_up_and_disable():
    base = logits(llama())
    model = get_peft_model(llama(), config())
    assert not model.supports_lora_conversion()
    model.add_adapter("other", config(r=2, target_modules=["v_proj", "up_proj"]))
    randomize(model)
    first = logits(model)
    model.set_adapter("other")
    other = logits(model)
    model.base_model.set_adapter(["default", "other"])
    both = logits(model)
    assert relative(first, other) > 1e-3
    assert relative(both, first) > 1e-3
    layer = model.base_model.model.model.layers[0].self_attn.v_proj
    x = torch.randn(5, 32)
    torch.testing.assert_close(layer(x), reference(layer, x, names=("default", "other")))
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), base)
    assert torch.equal(logits(model), both)
    zeros = zeros_of(llama())
    merged = merge(model)
    assert relative(logits(merged), both) < 1e-5
    assert_zeros(merged, zeros)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_adapter_and_back_restores_every_bit(dtype):
    model = randomize(get_peft_model(llama(dtype), config(target_modules="all-linear")))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapted = logits(model)
    model.merge_adapter()
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    assert layer.merged
    assert not torch.equal(layer.weight, before["base_model.model.model.layers.0.mlp.down_proj.base_layer.weight"])
    assert bool((layer.weight[layer.unmerged_weight() == 0] == 0).all())
    assert relative(logits(model), adapted) < (1e-5 if dtype == torch.float32 else 0.02)
    model.unmerge_adapter()
    torch.testing.assert_close(dict(model.named_parameters()), before, rtol=0, atol=0)
    assert torch.equal(logits(model), adapted)


def test_a_weight_that_a_merge_swallows_comes_back():
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[1e-12, 0.0]])
    model = get_peft_model(nn.Sequential(layer), config(target_modules=["0"], r=1, lora_alpha=1))
    adapted = model.base_model.model[0]
    adapted.lora_A["default"].weight.data, adapted.lora_B["default"].weight.data = torch.ones(1, 2), torch.ones(1, 1)
    model.merge_adapter()
    assert torch.equal(layer.weight, torch.tensor([[1.0, 0.0]]))
    model.unmerge_adapter()
    assert torch.equal(layer.weight, torch.tensor([[1e-12, 0.0]]))
