"""Attributes of a configuration are found by the shapes that they give."""

import copy

import pytest
import torch
import transformers as hf
from support.tiny import tiny
from support.zoo import ZOO
from torch import nn

from wanda_lightning.models.configuration import find_change, pretrained_models, shapes_of


def on_meta(model_class, config):
    with torch.device("meta"):
        return model_class(copy.deepcopy(config))


@pytest.mark.parametrize("key", ["num_local_experts", "intermediate_size", "vocab_size", "num_hidden_layers"])
def test_the_one_attribute_with_the_shapes_changes(key):
    model = ZOO["mixtral"].build()
    config = model.config
    old = getattr(config, key)
    expected = copy.deepcopy(config)
    setattr(expected, key, old + 2)
    change = find_change(model, shapes_of(on_meta(type(model), expected)), old, old + 2)
    assert getattr(config, key) == old  # until it is called
    change()
    assert config.to_dict() == expected.to_dict()


def test_attributes_that_are_equal_by_chance_stay():
    model = ZOO["mixtral"].build()
    assert model.config.num_attention_heads == model.config.num_local_experts == 4
    expected = copy.deepcopy(model.config)
    expected.num_local_experts = 2
    find_change(model, shapes_of(on_meta(type(model), expected)), 4, 2)()
    assert model.config.num_attention_heads == 4
    assert model.config.num_local_experts == 2


def test_an_attribute_of_a_configuration_inside_changes():
    config = tiny(hf.Qwen3VLMoeConfig)
    model = on_meta(hf.Qwen3VLMoeForConditionalGeneration, config)
    expected = copy.deepcopy(config)
    old = expected.text_config.num_experts
    expected.text_config.num_experts = old - 1
    find_change(model, shapes_of(on_meta(type(model), expected)), old, old - 1, word="expert")()
    assert model.config.text_config.num_experts == old - 1


def test_two_attributes_may_change_together():
    model = ZOO["llama"].build()
    expected = copy.deepcopy(model.config)
    expected.intermediate_size = expected.vocab_size = 80
    model.config.intermediate_size = model.config.vocab_size
    old = model.config.vocab_size
    find_change(model, shapes_of(on_meta(type(model), expected)), old, 80)()
    assert (model.config.intermediate_size, model.config.vocab_size) == (80, 80)


def test_shapes_that_no_attribute_gives():
    model = ZOO["mixtral"].build()
    shapes = shapes_of(model)
    shapes["model.layers.0.mlp.gate.weight"] = torch.Size((3, 32))
    assert find_change(model, shapes, 4, 3) is None


def test_the_outermost_models_of_a_module():
    first, second = ZOO["llama"].build(), ZOO["mixtral"].build()
    assert list(pretrained_models(nn.ModuleDict({"a": first, "b": nn.ModuleList([second])}))) == [first, second]
    assert not list(pretrained_models(nn.Linear(2, 2)))
