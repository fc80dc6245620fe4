"""Compare tensors that are equal up to rounding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wanda_lightning.common.float64 import widest

_CLOSE = 1e-4  # relative; 16-bit numbers that are this close are equal


def coarsest_eps(tensors: Sequence[Tensor]) -> float:
    """Return the precision of the coarsest dtype, including that of autocast."""
    dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    for device in {tensor.device.type for tensor in tensors}:
        if torch.is_autocast_enabled(device):
            dtypes.add(torch.get_autocast_dtype(device))
    return max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)


def all_same(
    before: Sequence[Tensor], after: Sequence[Tensor], eps: float, loosely: bool = False
) -> bool:
    """Whether two lists of tensors have the same shapes and are the same (see `same`)."""
    if [tensor.shape for tensor in before] != [tensor.shape for tensor in after]:
        return False
    return all(same(old, new, eps, loosely=loosely) for old, new in zip(before, after, strict=True))


def same(
    old: Tensor, new: Tensor, eps: float, each_column: bool = False, loosely: bool = False
) -> bool:
    """Whether two tensors are the same: most entries are close, and the norm of the difference is a few roundings.

    The norm is over the whole tensor, or over each column with `each_column`. One large activation dominates a norm, so
    most entries must also be close individually. After many blocks they need not be (`loosely`).
    """
    if not old.is_floating_point():
        return torch.equal(old, new)

    old = widest(old)
    new = widest(new)
    difference = torch.where(old == new, 0.0, old - new).abs()  # both may be infinite
    if old.numel() and not loosely:
        close = (difference <= _CLOSE * old.abs()).double().mean()
        if close <= (0.9 if each_column else 0.5):
            return False

    dims = 0 if each_column else None
    norm = torch.linalg.vector_norm(difference, dim=dims)
    scale = torch.linalg.vector_norm(old, dim=dims)
    limit = max(8 * eps, _CLOSE if each_column or loosely else 1e-5)
    return bool((norm <= limit * scale).all())
