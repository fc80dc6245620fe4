"""Private names of PyTorch: each test says what a release of PyTorch has changed."""

import pytest
import torch
import torch.nn.functional as F
from support.layers import assert_same
from torch import nn
from torch.overrides import TorchFunctionMode

from wanda_lightning.calibration.torch_internals import (
    active_modes,
    inside_transform,
    is_mapped,
    is_transformed,
    set_active_modes,
    visible_attention,
    write_count,
)


def test_a_tensor_counts_how_often_it_was_written_to():
    tensor = torch.zeros(2)
    before = write_count(tensor)
    tensor.add_(1)
    assert write_count(tensor) == before + 1, "Tensor._version does not count writes any more"
    with torch.inference_mode():
        assert write_count(torch.zeros(2)) == 0


@pytest.mark.parametrize(
    ("transform", "mapped"), [(torch.func.vmap, True), (torch.func.grad, False)]
)
def test_transforms_are_recognized(transform, mapped):
    found = []

    def function(x):
        found.append((inside_transform(), is_transformed(x), is_mapped(x)))
        return x.sum()

    transform(function)(torch.ones(2))
    assert found == [(True, True, mapped)], "torch._C._functorch has changed"
    plain = torch.ones(2)
    assert not any([inside_transform(), is_transformed(plain), is_mapped(plain)])


def test_modes_are_left_and_entered_again():
    with TorchFunctionMode() as functions:
        modes = active_modes()
        assert modes == [functions], "the stacks of modes of PyTorch have changed"
        set_active_modes([])
        assert active_modes() == [], "PyTorch pops modes in another way"
        set_active_modes(modes)
        assert active_modes() == modes, "PyTorch pushes modes in another way"


def test_a_mode_sees_the_products_in_attention_whose_result_is_the_same():
    attention = nn.MultiheadAttention(8, 2, kdim=7, vdim=6, add_bias_kv=True)
    inputs = torch.randn(5, 3, 8), torch.randn(4, 3, 7), torch.randn(4, 3, 6)
    seen = []

    class Seeing(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is F.multi_head_attention_forward:
                with self:
                    return visible_attention(*args, **kwargs)
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Seeing():
        results = attention(*inputs)
    assert seen.count(F.linear) == 4, "torch.nn.functional has another way to look for modes"
    assert_same(results, attention(*inputs))
