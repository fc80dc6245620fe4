"""Stand in for the weights of a model that are not in memory."""

from __future__ import annotations

import torch
from torch import Tensor


def placeholder(like: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the same shape and dtype on a device that occupies a single element: NaN if it can be.

    Unlike a tensor on the meta device, it does not change the device that a model reports; and what a forward computes
    with it is NaN, which calibration refuses.
    """
    value = torch.nan if like.is_floating_point() else 0
    return torch.full((), value, dtype=like.dtype, device=device).expand(like.shape)


def is_unloaded(tensor: Tensor) -> bool:
    """Whether a tensor is a placeholder: its entries share one element."""
    return tensor.numel() > 1 and not any(tensor.stride())
