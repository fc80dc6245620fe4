"""Masked tensors hold the exact values where they are kept, and 0.0 elsewhere; packed masks are NumPy's packbits."""

from functools import partial

import numpy as np
import pytest
import torch
from support.layers import DTYPES, rng
from torch.testing import assert_close

from wanda_lightning.core.masking import as_numbers, mask_, masked, pack, unpack

VALUES = [1.5, -0.0, float("nan"), float("nan"), float("inf"), -float("inf"), -3.25, 6e-8]
KEEP = torch.tensor([True, False] * 4)

assert_same = partial(assert_close, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropped_values_become_zero_whatever_they_were(dtype):
    tensor = torch.tensor(VALUES, dtype=dtype)
    before = tensor.clone()
    result = masked(tensor, KEEP)
    assert result.dtype == dtype
    assert_same(result, torch.where(KEEP, tensor, 0))
    assert not result[~KEEP].signbit().any()
    assert_same(tensor, before)
    mask_(tensor, KEEP)
    assert_same(tensor, result)


def test_flags_as_numbers_are_a_view():
    numbers = as_numbers(KEEP)
    assert numbers.tolist() == [1, 0] * 4
    assert numbers.data_ptr() == KEEP.data_ptr()


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.02, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(0, 4), (1,), (7,), (8,), (3, 5), (64, 64), (2, 100, 33)])
def test_flags_are_packed_into_bits_or_indices_and_unpacked(shape, fraction):
    flags = torch.rand(shape, generator=rng()) < fraction
    bits = torch.from_numpy(np.packbits(flags.numpy()))
    packed = pack(flags)
    assert torch.equal(unpack(packed, shape), flags)
    assert packed.nbytes <= bits.nbytes
    if packed.dtype == torch.int64:
        assert packed.tolist() == flags.flatten().nonzero().flatten().tolist()
    else:
        assert torch.equal(packed, bits)
