"""Attributes of a configuration are found by the shapes that they give."""

import copy

import pytest
import torch
import transformers as hf
from support.tiny import tiny
from support.zoo import ZOO
from torch import nn

from wanda_lightning.units.fit_configuration import fit_configuration


def reshaped(model_class, config, new):
    """A model with the shapes of `new`, but with the other configuration."""
    with torch.device("meta"):
        model = model_class(copy.deepcopy(new))
    for module in model.modules():
        if hasattr(module, "config"):
            module.config = config
    return model


@pytest.mark.parametrize(
    ("model_class", "old", "inside", "changes"),
    [
        # Attributes that are equal by chance stay: 4 heads as 4 experts, and 2 layers.
        (hf.MixtralForCausalLM, ZOO["mixtral"].build().config, None, {"num_local_experts": 6}),
        (hf.MixtralForCausalLM, ZOO["mixtral"].build().config, None, {"num_local_experts": 2}),
        (
            hf.MixtralForCausalLM,
            ZOO["mixtral"].build().config,
            None,
            {"intermediate_size": 62, "vocab_size": 126},
        ),
        (
            hf.Qwen3VLMoeForConditionalGeneration,
            tiny(hf.Qwen3VLMoeConfig),
            "text_config",
            {"num_experts": 3},
        ),
    ],
)
def test_the_attributes_with_the_shapes_change_and_can_be_changed_back(
    model_class, old, inside, changes
):
    new = copy.deepcopy(old)
    for key, value in changes.items():
        setattr(getattr(new, inside) if inside else new, key, value)
    model = reshaped(model_class, old, new)
    misfit, undo = fit_configuration(nn.ModuleList([model]))
    assert not misfit
    assert model.config.to_dict() == new.to_dict() != old.to_dict()
    undo()
    assert model.config is old


def test_shapes_that_no_attribute_gives():
    model = ZOO["mixtral"].build()
    before = model.config.to_dict()
    model.model.layers[0].mlp.gate.weight = nn.Parameter(torch.zeros(3, 32))
    misfit, undo = fit_configuration(model)
    undo()
    assert misfit == "no configuration of MixtralForCausalLM gives the new numbers (3)"
    assert model.config.to_dict() == before
