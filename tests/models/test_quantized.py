"""Layers as quantization libraries make them, beside ordinary ones."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from wanda_lightning.models.quantized import is_quantized


def with_buffer(name, dtype):
    module = nn.Module()
    module.register_buffer(name, torch.zeros(4, 4, dtype=dtype))
    return module


def with_parameter(dtype):
    module = nn.Linear(4, 4)
    module.weight = nn.Parameter(torch.zeros(4, 4, dtype=dtype), requires_grad=False)
    return module


class Linear8bitLt(nn.Linear):
    __module__ = "bitsandbytes.nn.modules"


class Subclass(torch.Tensor):
    """A tensor that reports float32, whatever it stores."""


def with_tensor_subclass():
    module = nn.Linear(4, 4)
    module.weight = nn.Parameter(torch.zeros(4, 4).as_subclass(Subclass))
    return module


@pytest.mark.parametrize(
    ("module", "quantized"),
    [
        (with_buffer("qweight", torch.int32), True),
        (with_buffer("weight", torch.float8_e4m3fn), True),
        (with_parameter(torch.uint8), True),
        (with_parameter(torch.float8_e5m2), True),
        (with_tensor_subclass(), True),
        (Linear8bitLt(4, 4), True),
        (nn.Linear(4, 4), False),
        (nn.Linear(4, 4, dtype=torch.float16), False),
        (parametrizations.weight_norm(nn.Linear(4, 4)), False),
        (with_buffer("position_ids", torch.int64), False),
        (with_buffer("weight", torch.float32), False),
        (nn.Sequential(with_parameter(torch.uint8)), False),  # its child is quantized, it is not
    ],
)
def test_quantized_layers_are_recognized(module, quantized):
    assert is_quantized(module) is quantized
