"""The layer against dense autograd over W + s (B A) * keep, PEFT's operations on it, and merging."""

from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from support.layers import assert_same
from support.lora import (
    TARGETS,
    assert_zeros,
    config,
    gpt2,
    llama,
    logits,
    randomize,
    reference,
    relative,
    single,
    sparse_layer,
    train,
    zeros_of,
)
from torch import nn
from torch.testing import assert_close

from wanda_lightning.lora import KeepZerosLoraConfig, merge


def test_updates_below_the_last_digit_of_bfloat16_count():
    dense = nn.Linear(16, 16, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(dense.weight)
    model, layer = single(dense, r=16, lora_alpha=16)
    layer.lora_A["default"].weight.data = torch.eye(16)
    layer.lora_B["default"].weight.data = delta = torch.eye(16) * 2**-12
    assert torch.equal((dense.weight + delta).bfloat16(), dense.weight)  # lost in a sum
    x = torch.tensor([1.0, -1.0]).repeat(3, 8).bfloat16()  # of which the layer itself makes 0
    assert torch.equal(model(x), x * 2**-12)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d", "autocast"])
def test_output_and_gradients_are_those_of_dense_autograd(kind, dropout):
    """Autocast computes in its dtype and gives float32 gradients. No copy of the weight waits for backward."""
    mixed = kind == "autocast"
    dtype = torch.float32 if mixed else torch.float64
    tolerance = 0.02 if mixed else 1e-9
    model, layer = single(sparse_layer(kind, bias=kind != "no bias"), lora_dropout=dropout)
    model.to(dtype)
    base = layer.base_layer.requires_grad_(dropout > 0)  # also of an unfrozen base
    x = torch.randn(3, 5, 24, dtype=dtype, requires_grad=True)
    trained = [x, *(weight for weight in layer.parameters() if weight.requires_grad)]

    torch.manual_seed(7)
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    )
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
        with hooks:
            output = model(x)
        # Backward inside, as some loops do.
        gradients = torch.autograd.grad(output.to(dtype).square().sum(), trained)
    expected = reference(layer, x, dropout_seed=7 if dropout else None)
    expected_gradients = torch.autograd.grad(expected.square().sum(), trained)

    assert output.dtype == (torch.bfloat16 if mixed else torch.float64)
    assert relative(output.to(dtype), expected) < tolerance
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert gradient.dtype == dtype
        assert relative(gradient, expected_gradient) < tolerance
    if not mixed:
        large = {tensor.data_ptr() for tensor in saved if tensor.numel() == base.weight.numel()}
        assert large == {base.weight.data_ptr()}


def test_hooks_of_the_layer_run():
    """One product would pass them by. torch has only private names for the hooks of a module."""
    model, layer = single(sparse_layer("linear"))
    calls = []
    layer.base_layer.register_forward_hook(lambda *_: calls.append(1))
    layer.base_layer.register_full_backward_hook(lambda *_: calls.append(2))
    model(torch.randn(3, 24, dtype=torch.float64, requires_grad=True)).sum().backward()
    assert calls == [1, 2]


def test_options_of_lora_work_as_in_plain_lora_on_a_dense_layer():
    options = {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["0"]}
    dense = nn.Linear(24, 40)
    plain = randomize(get_peft_model(nn.Sequential(dense), LoraConfig(**options)))
    x = torch.randn(7, 24)
    expected = plain(x)
    plain.unload()
    model = randomize(get_peft_model(nn.Sequential(dense), KeepZerosLoraConfig(**options)))
    assert_close(model(x), expected)
    assert_close(merge(model)(x), expected)


def test_adapters_switch_add_up_and_disable():
    base = logits(llama())
    model = get_peft_model(llama(), config())
    model.add_adapter("other", config(r=2, target_modules=["v_proj", "up_proj"]))
    randomize(model)
    layer = model.base_model.model.model.layers[0].self_attn.v_proj
    x = torch.randn(5, 32)
    for names in (("other",), ("default", "other")):
        model.base_model.set_adapter([*names])
        assert_close(layer(x), reference(layer, x, names=names))
    both = logits(model)
    with model.disable_adapter():
        assert_close(logits(model), base)
    assert torch.equal(logits(model), both)
    zeros = zeros_of(llama())
    merged = merge(model)
    assert relative(logits(merged), both) < 1e-5
    assert_zeros(merged, zeros)


def test_a_masked_product_cannot_be_converted_to_lora():
    assert not get_peft_model(llama(), config()).supports_lora_conversion()


def test_merge_adapter_and_back_restores_every_bit():
    model = randomize(get_peft_model(llama(torch.bfloat16), config(target_modules="all-linear")))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapted = logits(model)
    model.merge_adapter()
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    assert layer.merged
    unmerged = before["base_model.model.model.layers.0.mlp.down_proj.base_layer.weight"]
    assert not torch.equal(layer.weight, unmerged)
    assert not layer.weight[unmerged == 0].any()
    assert relative(logits(model), adapted) < 0.02
    model.unmerge_adapter()
    assert_same(dict(model.named_parameters()), before)
    assert torch.equal(logits(model), adapted)


@pytest.mark.parametrize(
    ("build", "dropout", "rounding"),
    [
        (llama, 0.3, 1e-5),
        (gpt2, 0.0, 1e-5),
        # Two layers, with 2^-8 each for weights and activations.
        (partial(llama, torch.bfloat16), 0.0, 0.02),
    ],
)
def test_trained_adapters_merge_to_what_was_trained_with_every_zero(build, dropout, rounding):
    base = build()
    zeros = zeros_of(base)
    dtype = base.dtype
    model = get_peft_model(base, config(target_modules="all-linear", lora_dropout=dropout))
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    losses = train(model)
    assert losses[-1] < losses[0]
    adapted = logits(model)
    with model.disable_adapter():
        assert relative(logits(model), adapted) > 1e-3
    merged = merge(model)
    assert type(merged) is type(base)
    assert merged.dtype == dtype
    assert not any(isinstance(module, LoraLayer) for module in merged.modules())
    assert relative(logits(merged), adapted) < rounding
    assert_zeros(merged, zeros)


def test_merging_matrices_that_were_trained_whole_warns():
    options = config(target_modules=["q_proj"], modules_to_save=["o_proj"])
    model = randomize(get_peft_model(llama(), options))
    train(model, steps=1)
    with pytest.warns(UserWarning, match=r"first in model\.layers\.0\.self_attn\.o_proj\.weight"):
        merge(model)


def test_merging_plain_lora_warns():
    model = randomize(get_peft_model(llama(), LoraConfig(r=4, target_modules=TARGETS)))
    adapted = logits(model)
    with pytest.warns(
        UserWarning,
        match=r"merge filled zeros of 6 of 6 targeted matrices, first in model\.layers\.0",
    ):
        merged = merge(model)
    assert relative(logits(merged), adapted) < 1e-5
    assert merged.model.layers[0].self_attn.q_proj.weight.all()


@pytest.mark.parametrize("merges", [False, True])
def test_reprune_puts_the_zeros_back(merges):
    base = llama()
    zeros = zeros_of(base)
    model = randomize(get_peft_model(base, LoraConfig(r=4, target_modules=TARGETS)))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    expected = (layer.weight + layer.get_delta_weight("default")) * (layer.weight != 0)
    if merges:
        model.merge_adapter()  # the zeros are those from before
    merged = merge(model, reprune=True)
    assert_zeros(merged, zeros)
    assert_close(merged.model.layers[0].self_attn.q_proj.weight, expected)
