"""Merging keep-zeros and plain adapters: every zero, and the outputs of the adapted model."""

from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from support.lora import (
    TARGETS,
    assert_zeros,
    config,
    gpt2,
    llama,
    logits,
    randomize,
    relative,
    train,
    zeros_of,
)

from wanda_lightning.lora import merge


@pytest.mark.parametrize(
    ("build", "dropout", "rounding"),
    [
        (llama, 0.3, 1e-5),
        (gpt2, 0.0, 1e-5),
        (partial(llama, torch.bfloat16), 0.0, 0.02),  # two layers, 2^-8 each for weights and activations
    ],
)
def test_trained_adapters_merge_to_what_was_trained_with_every_zero(build, dropout, rounding):
    base = build()
    zeros, dtype = zeros_of(base), base.dtype
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


def test_merging_plain_lora_and_matrices_trained_whole_warns():
    model = randomize(get_peft_model(llama(), config(target_modules=["q_proj"], modules_to_save=["o_proj"])))
    train(model, steps=1)
    with pytest.warns(UserWarning, match=r"first in model\.layers\.0\.self_attn\.o_proj\.weight"):
        merge(model)
    model = randomize(get_peft_model(llama(), LoraConfig(r=4, target_modules=TARGETS)))
    adapted = logits(model)
    with pytest.warns(UserWarning, match=r"merge filled zeros of 6 of 6 targeted matrices, first in model\.layers\.0"):
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
    torch.testing.assert_close(merged.model.layers[0].self_attn.q_proj.weight, expected)
