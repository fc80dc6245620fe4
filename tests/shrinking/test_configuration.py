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


@pytest.mark.parametrize("key", ["num_local_experts", "intermediate_size", "vocab_size"])
def test_the_one_attribute_with_the_shapes_changes_and_can_be_changed_back(key):
    old = ZOO["mixtral"].build().config
    new = copy.deepcopy(old)
    setattr(new, key, getattr(old, key) + 2)
    model = reshaped(hf.MixtralForCausalLM, old, new)
    misfit, undo = fit_configuration(model)
    assert not misfit
    assert model.config.to_dict() == new.to_dict()
    undo()
    assert model.config is old


def test_attributes_that_are_equal_by_chance_stay():
    config = ZOO["mixtral"].build().config
    assert config.num_attention_heads == config.num_local_experts == 4
    new = copy.deepcopy(config)
    new.num_local_experts = config.num_hidden_layers = new.num_hidden_layers = 2
    config.num_local_experts = 4
    model = reshaped(hf.MixtralForCausalLM, config, new)
    assert not fit_configuration(model)[0]
    assert model.config.to_dict() == new.to_dict()


def test_an_attribute_of_a_configuration_inside_changes():
    config = tiny(hf.Qwen3VLMoeConfig)
    new = copy.deepcopy(config)
    new.text_config.num_experts -= 1
    model = reshaped(hf.Qwen3VLMoeForConditionalGeneration, config, new)
    assert not fit_configuration(nn.ModuleList([model]))[0]
    assert model.config.text_config.num_experts == new.text_config.num_experts


def test_two_attributes_may_change():
    config = ZOO["llama"].build().config
    new = copy.deepcopy(config)
    new.intermediate_size, new.vocab_size = config.intermediate_size - 8, config.vocab_size - 8
    model = reshaped(hf.LlamaForCausalLM, config, new)
    assert not fit_configuration(model)[0]
    assert model.config.to_dict() == new.to_dict()


def test_shapes_that_no_attribute_gives():
    model = ZOO["mixtral"].build()
    before = model.config.to_dict()
    model.model.layers[0].mlp.gate.weight = nn.Parameter(torch.zeros(3, 32))
    misfit, undo = fit_configuration(model)
    undo()
    assert misfit == "no configuration of MixtralForCausalLM gives the new numbers (3)"
    assert model.config.to_dict() == before
