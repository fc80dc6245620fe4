"""Layers that cannot take an adapter."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.lora import TARGETS, CodesParameter, config, llama, sparse_layer
from torch import nn


def test_two_targets_with_one_weight_are_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="0 and 1 share one weight"):
        get_peft_model(model, config(target_modules=["0", "1"]))


# PEFT itself only warns of two adapters in one model.
@pytest.mark.filterwarnings("ignore:You are trying to modify a model:UserWarning")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_plain_and_keep_zeros_adapters_do_not_mix():
    model = get_peft_model(llama(), config())
    with pytest.raises(ValueError, match="different peft types"):
        model.add_adapter("plain", LoraConfig(target_modules=TARGETS))
    plain = get_peft_model(llama(), LoraConfig(target_modules=TARGETS))
    with pytest.raises(ValueError, match="without adapters of another type, but model"):
        get_peft_model(plain.base_model.model, config())


class FakeQuantLinear(nn.Module):
    """Like the layers of GPTQ and AWQ: no weight at all."""

    def __init__(self):
        super().__init__()
        self.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))


def bits_in_a_parameter():
    layer = nn.Linear(8, 8)
    layer.weight = CodesParameter(torch.zeros(8, 8, dtype=torch.uint8), requires_grad=False)
    return layer


def float8():
    return nn.Linear(8, 8).to(torch.float8_e4m3fn)


OTHER = r"but 1 is a {}\. Remove it from target_modules"


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        *[
            (make(), r"1 is a quantized layer .* Load the model without quantization")
            for make in (bits_in_a_parameter, FakeQuantLinear, float8)
        ],
        (nn.Embedding(8, 8), OTHER.format("Embedding")),
        (nn.Conv2d(3, 8, 3), OTHER.format("Conv2d")),
        (nn.MultiheadAttention(8, 2), OTHER.format("MultiheadAttention")),
        (nn.MultiheadAttention(8, 2).out_proj, r"inside nn\.MultiheadAttention"),
    ],
)
def test_other_layers_are_refused_by_name_before_anything_changes(layer, message):
    model = nn.Sequential(sparse_layer("linear"), layer)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, config(target_modules=["0", "1"]))
    assert type(model[0]) is nn.Linear
