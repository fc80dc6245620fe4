"""Masked tensors hold the exact values where they are kept, and 0.0 elsewhere; packed masks are NumPy's packbits."""

import numpy as np
import pytest
import torch

from wanda_lightning.core.masking import as_numbers, fits, mask_, masked, pack, unpack

VALUES = [1.5, -0.0, float("nan"), float("nan"), float("inf"), -float("inf"), -3.25, 6e-8]


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_dropped_values_become_zero_whatever_they_were(dtype):
    tensor, keep = torch.tensor(VALUES, dtype=dtype), torch.tensor([True, False] * 4)
    before = tensor.clone()
    result = masked(tensor, keep)
    assert result.dtype == dtype
    torch.testing.assert_close(result, torch.where(keep, tensor, 0), rtol=0, atol=0, equal_nan=True)
    assert not result[~keep].signbit().any()
    torch.testing.assert_close(tensor, before, rtol=0, atol=0, equal_nan=True)
    mask_(tensor, keep)
    torch.testing.assert_close(tensor, result, rtol=0, atol=0, equal_nan=True)
    assert as_numbers(keep).data_ptr() == keep.data_ptr()


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.02, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(0, 4), (1,), (7,), (8,), (3, 5), (64, 64), (2, 100, 33)])
def test_flags_are_packed_into_bits_or_indices_and_unpacked(shape, fraction):
    given = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < fraction
    packed = pack(given)
    assert torch.equal(unpack(packed, shape), given)
    assert packed.nbytes <= -(-given.numel() // 8)
    assert fits(packed, shape)
    assert not fits(packed, (given.numel() + 80,)) or packed.dtype == torch.int64
    if packed.dtype == torch.int64:
        assert packed.tolist() == given.flatten().nonzero().flatten().tolist()
    else:
        assert torch.equal(packed, torch.from_numpy(np.packbits(given.numpy())))
