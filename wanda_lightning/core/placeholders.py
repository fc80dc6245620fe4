"""Placeholders for weights that are not in memory."""

import torch
from torch import Tensor


def placeholder(like: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the same shape and dtype that occupies one element: NaN, or 0 in an integer dtype.

    Unlike a tensor on the meta device, it does not change the device that a model reports. Any result computed from it
    is NaN, which calibration refuses.
    """
    value = torch.nan if like.is_floating_point() else 0
    element = torch.full((), value, dtype=like.dtype, device=device)
    return element.expand(like.shape)


def is_unloaded(tensor: Tensor) -> bool:
    """Whether a tensor is a placeholder: its entries share one element."""
    return tensor.numel() > 1 and not any(tensor.stride())
