"""Attributes of a configuration are found by the shapes that they give."""

import copy

import pytest
import torch
import transformers as hf
from support.tiny import tiny
from support.zoo import ZOO
from torch import nn

from wanda_lightning.shrinking.configuration import fit_configuration


def reshaped(model_class, config, new):
    """A model with the shapes of `new`, but with the other configuration."""
    with torch.device("meta"):
        model = model_class(copy.deepcopy(new))
    for module in model.modules():
        if hasattr(module, "config"):
            module.config = config
    return model


@pytest.mark.parametrize(
    "changes",
    [
        {"num_local_experts": 6},
        {"intermediate_size": 62, "vocab_size": 126},
        {"num_local_experts": 2},  # attributes that are equal by chance stay: 4 heads, and 2 layers
    ],
)
def test_the_attributes_with_the_shapes_change_and_can_be_changed_back(changes):
    old = ZOO["mixtral"].build().config
    assert old.num_attention_heads == old.num_local_experts == 4
    new = copy.deepcopy(old)
    for key, value in changes.items():
        setattr(new, key, value)
    model = reshaped(hf.MixtralForCausalLM, old, new)
    misfit, undo = fit_configuration(model)
    assert not misfit
    assert model.config.to_dict() == new.to_dict()
    undo()
    assert model.config is old


def test_an_attribute_of_a_configuration_inside_changes():
    config = tiny(hf.Qwen3VLMoeConfig)
    new = copy.deepcopy(config)
    new.text_config.num_experts -= 1
    model = reshaped(hf.Qwen3VLMoeForConditionalGeneration, config, new)
    assert not fit_configuration(nn.ModuleList([model]))[0]
    assert model.config.text_config.num_experts == new.text_config.num_experts


def test_shapes_that_no_attribute_gives():
    model = ZOO["mixtral"].build()
    before = model.config.to_dict()
    model.model.layers[0].mlp.gate.weight = nn.Parameter(torch.zeros(3, 32))
    misfit, undo = fit_configuration(model)
    undo()
    assert misfit == "no configuration of MixtralForCausalLM gives the new numbers (3)"
    assert model.config.to_dict() == before
