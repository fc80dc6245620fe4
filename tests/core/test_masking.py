"""Masked tensors hold the exact values where they are kept, and 0.0 elsewhere."""

import pytest
import torch

from wanda_lightning.core.masking import as_numbers, mask_, masked

VALUES = [1.5, -0.0, 0.0, float("nan"), float("inf"), -float("inf"), -3.25, 6e-8]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dropped_values_become_zero_whatever_they_were(dtype):
    tensor = torch.tensor(VALUES, dtype=dtype)
    keep = torch.tensor([True, False] * 4)
    before, result = tensor.clone(), masked(tensor, keep)
    assert result.dtype == dtype
    assert torch.equal(result, torch.where(keep, tensor, torch.zeros((), dtype=dtype)))
    assert not result[~keep].signbit().any()
    assert torch.equal(tensor.nan_to_num(nan=7), before.nan_to_num(nan=7))
    mask_(tensor, keep)
    assert torch.equal(tensor, result)


def test_kept_nan_stays():
    assert masked(torch.tensor([float("nan"), 1.0]), torch.tensor([True, True])).isnan().tolist() == [True, False]


def test_booleans_as_numbers_share_memory():
    flags = torch.tensor([True, False])
    assert as_numbers(flags).tolist() == [1, 0]
    assert as_numbers(flags).data_ptr() == flags.data_ptr()
