"""Move the zeros of a layer by the magnitudes of weights and gradients."""

from __future__ import annotations

import torch

from wanda_lightning.core.keep_largest import keep_largest
from wanda_lightning.core.types import KeepMask, Score, Weight


def drop_and_grow(weight: Weight, gradient: Weight, keep: KeepMask, share: float, group_size: int = 0) -> KeepMask:
    """Drop the smallest kept weights, and keep as many zeros with the largest gradients (RigL, Evci et al. 2020).

    For N:M, a group changes by at most one weight: the smallest kept one is dropped for the one with the largest
    gradient, in the groups whose smallest kept weight is smallest.

    Args:
        weight: The weights, (d_out, d_in).
        gradient: Their gradients, also of the zeros.
        keep: The present mask. The number of kept weights stays the same in the layer, and in each group of N:M.
        share: Fraction of the kept weights to drop, in [0, 1]; fewer if fewer zeros have a gradient.
        group_size: M of N:M, or 0 for unstructured zeros.

    Returns:
        The new mask, (d_out, d_in).
    """
    small, large = -weight.abs().float(), gradient.abs().float()
    small, large = small.masked_fill(~keep, -torch.inf), large.masked_fill(keep, 0.0)
    count = int(share * int(keep.sum()))
    if not group_size:
        return _swap(keep.reshape(1, -1), small.reshape(1, -1), large.reshape(1, -1), count).reshape(keep.shape)
    groups, small, large = (each.reshape(-1, group_size) for each in (keep, small, large))
    grown, dropped = large.max(dim=1), small.max(dim=1)
    can_grow = grown.values > 0
    order = dropped.values.masked_fill(~can_grow, -torch.inf).unsqueeze(0)
    chosen = keep_largest(order, min(count, int(can_grow.sum()))).squeeze(0)
    new = groups.clone()
    new[chosen, dropped.indices[chosen]] = False
    new[chosen, grown.indices[chosen]] = True
    return new.reshape(keep.shape)


def _swap(keep: KeepMask, small: Score, large: Score, count: int) -> KeepMask:
    count = min(count, int((large > 0).sum()))
    return (keep & ~keep_largest(small, count)) | keep_largest(large, count)
