"""Packed flags against NumPy's packbits and against themselves."""

import numpy as np
import pytest
import torch

from wanda_lightning.core.bits import pack, unpack


def flags(shape, fraction):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) < fraction


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.02, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(0, 4), (1,), (7,), (8,), (3, 5), (4, 16), (2, 100, 33)])
def test_unpacking_returns_what_was_packed(shape, fraction):
    given = flags(shape, fraction)
    assert torch.equal(unpack(pack(given), shape), given)


@pytest.mark.parametrize("size", [1, 8, 13, 4096])
def test_dense_flags_are_the_bits_of_numpy(size):
    given = flags((size,), 0.5) | (torch.arange(size) == 0)
    packed = pack(given)
    assert packed.dtype == torch.uint8
    assert torch.equal(packed, torch.from_numpy(np.packbits(given.numpy())))


def test_few_flags_are_indices():
    given = torch.zeros(50, 50, dtype=torch.bool)
    given[1, 2] = given[49, 49] = True
    assert pack(given).tolist() == [52, 2499]


def test_the_packed_form_takes_at_most_one_bit_per_element():
    for fraction in (0.0, 0.001, 0.1, 0.9):
        assert pack(flags((64, 64), fraction)).nbytes <= 64 * 64 / 8
