"""Compute in float32 or wider, and in float64 where a device has it."""

import torch
from torch import Tensor


def has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64: `mps` and some GPUs of Intel do not."""
    # Not tried on CUDA: once it is in use, no process can fork.
    if device.type in ("cpu", "cuda"):
        return True
    try:
        return torch.ones((), device=device).double().dtype == torch.float64
    except (RuntimeError, TypeError):
        return False


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """Return float32, or the dtype of a tensor if that is wider."""
    return torch.promote_types(tensor.dtype, torch.float32)


def widened(tensor: Tensor) -> Tensor:
    """Return a tensor in `wide_dtype`."""
    return tensor.to(wide_dtype(tensor))


def widest(tensor: Tensor) -> Tensor:
    """Return a tensor in float64, on the CPU if its device has no float64."""
    if not has_float64(tensor.device):
        tensor = tensor.cpu()
    return tensor.double()
