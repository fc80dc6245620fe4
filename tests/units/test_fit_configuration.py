"""Attributes of a configuration are found by the shapes that they give."""

from copy import deepcopy
from functools import partial

import pytest
import torch
import transformers as hf
from support.quiet import shrink
from support.tiny import tiny
from support.zoo import batches_of, model_of
from torch import nn

from wanda_lightning.units.fit_configuration import auto_classes, fit_configuration


def reshaped(model_class, config, new):
    """A model with the shapes of `new`, but with the other configuration."""
    with torch.device("meta"):
        model = model_class(deepcopy(new))
    for module in model.modules():
        if hasattr(module, "config"):
            module.config = config
    return model


def assert_fits(model_class, old, new):
    """The attributes with the shapes change, and can be changed back."""
    model = reshaped(model_class, old, new)
    misfit, undo = fit_configuration(nn.ModuleList([model]))
    assert not misfit
    assert model.config.to_dict() == new.to_dict() != old.to_dict()
    undo()
    assert model.config is old


@pytest.mark.parametrize(
    "changes",
    [
        # Attributes that are equal by chance stay: 4 heads as 4 experts, and 2 layers.
        {"num_local_experts": 6},
        {"num_local_experts": 2},
        {"intermediate_size": 62, "vocab_size": 126},
    ],
)
def test_the_attributes_with_the_shapes_change(changes):
    old = model_of("mixtral").config
    new = deepcopy(old)
    new.update(changes)
    assert_fits(hf.MixtralForCausalLM, old, new)


def test_an_attribute_of_a_configuration_inside_another_changes():
    old = tiny(hf.Qwen3VLMoeConfig)
    new = deepcopy(old)
    new.text_config.num_experts = 3
    assert_fits(hf.Qwen3VLMoeForConditionalGeneration, old, new)


def test_shapes_that_no_attribute_gives():
    model = model_of("mixtral")
    before = model.config.to_dict()
    model.model.layers[0].mlp.gate.weight = nn.Parameter(torch.zeros(3, 32))
    misfit, undo = fit_configuration(model)
    undo()
    assert misfit == "no configuration of MixtralForCausalLM gives the new numbers (3)"
    assert model.config.to_dict() == before


def test_a_model_whose_widths_become_equal_is_of_its_family_again():
    model = model_of("llama")
    batches = batches_of("llama")
    halves = partial(shrink, model, batches, units=0.5, multiple_of=1)
    halves(skip="model.layers.0.*")
    assert type(model).__name__ == "ShrunkLlamaForCausalLM"
    halves(only="model.layers.0.*")
    assert type(model) is hf.LlamaForCausalLM
    assert not hasattr(model.config, "auto_map")


def test_the_class_of_the_model_is_named_where_an_auto_class_loads_several():
    names = auto_classes(hf.FunnelBaseModel, hf.FunnelConfig())
    assert names["AutoModel"] == "FunnelBaseModel"
    assert names["AutoModelForMaskedLM"] == "FunnelForMaskedLM"
