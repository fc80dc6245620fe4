"""Compare tensors that are equal up to rounding.

Two tensors are the same if most entries are close, and the norm of the difference is a few roundings. One large
activation dominates a norm, so most entries must also be close individually.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.linalg import vector_norm

from wanda_lightning.common.float64 import widest

_CLOSE = 1e-4  # relative; 16-bit numbers that are this close are equal


def coarsest_eps(tensors: Sequence[Tensor]) -> float:
    """Return the largest machine epsilon of the tensors' dtypes, and of autocast on their devices."""
    dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    for device in {tensor.device.type for tensor in tensors}:
        if torch.is_autocast_enabled(device):
            dtypes.add(torch.get_autocast_dtype(device))
    return max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)


def all_same(
    before: Sequence[Tensor], after: Sequence[Tensor], eps: float, loosely: bool = False
) -> bool:
    """Whether two lists of tensors have the same shapes and are the same.

    After many blocks, entries need not be close individually (`loosely`).
    """
    if [tensor.shape for tensor in before] != [tensor.shape for tensor in after]:
        return False

    limit = max(8 * eps, _CLOSE if loosely else 1e-5)
    share = -1.0 if loosely else 0.5
    pairs = zip(before, after, strict=True)
    return all(_is_same(old, new, limit, share) for old, new in pairs)


def same_columns(old: Tensor, new: Tensor, eps: float) -> bool:
    """Whether two matrices are the same, and each column of their difference has a small norm."""
    return _is_same(old, new, max(8 * eps, _CLOSE), 0.9, dim=0)


def _is_same(old: Tensor, new: Tensor, limit: float, share: float, dim: int | None = None) -> bool:
    """Whether more than a share of the entries is close, and the norm of the difference is within the limit."""
    if not old.is_floating_point():
        return torch.equal(old, new)

    old = widest(old)
    new = widest(new)
    difference = torch.where(old == new, 0.0, old - new).abs()  # both may be infinite
    close = difference <= _CLOSE * old.abs()
    if close.double().mean() <= share:  # the mean of no entries is NaN
        return False

    norm = vector_norm(difference, dim=dim)
    scale = vector_norm(old, dim=dim)
    return bool((norm <= limit * scale).all())
