"""Sparsity from the shape of the weights' spectra."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch

from wanda_lightning.core.allocation.base import Allocation, DenseLayer, Uniform
from wanda_lightning.core.allocation.groups import (
    Per,
    group_of,
    groups_of,
    refuse_one_group,
    refuse_unknown,
    unit_range,
)
from wanda_lightning.core.allocation.match_target import match_target, mean_of
from wanda_lightning.core.types import Weight


@dataclass(frozen=True)
class AlphaPruning(Allocation):
    """Less sparsity where the spectrum's tail is heavier, which means better trained (Lu et al. 2024).

    Of each matrix `tail_exponent`, of each block their mean; these are mapped linearly to [1 - epsilon, 1 + epsilon]
    times one factor that makes the mean the target. Needs no data.

    Attributes:
        epsilon: How far apart the sparsities may be.
        per: Whether all layers of a block get one sparsity (the paper's choice), or each its own.
    """

    epsilon: float = 0.3
    per: Per = "block"

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon < 1:
            raise ValueError(f"AlphaPruning needs an epsilon in [0, 1), but {self.epsilon} was given")
        refuse_unknown(self.per)

    def check(self, layers: Sequence[DenseLayer], sparsity: float) -> None:
        """Refuse a model with one block."""
        refuse_one_group(self, layers, self.per)

    def __call__(self, layers: Sequence[DenseLayer], sparsity: float) -> dict[str, float]:
        """Compare the blocks' spectra."""
        groups = groups_of(layers, self.per)
        each = {group: [tail_exponent(layer.read()) for layer in inside] for group, inside in groups.items()}
        known = {group: fmean(finite) for group, all_ in each.items() if (finite := list(filter(math.isfinite, all_)))}
        if not known:
            return Uniform()(layers, sparsity)
        exponents = unit_range({group: known.get(group, fmean(known.values())) for group in groups})
        wanted = {
            layer.name: 1 - self.epsilon + 2 * self.epsilon * exponents[group_of(layer, self.per)] for layer in layers
        }
        scale = sparsity / mean_of(layers, wanted)
        return match_target(layers, {name: scale * value for name, value in wanted.items()}, sparsity)


def tail_exponent(weight: Weight) -> float:
    """Hill's estimate of the exponent of the power law that the larger half of the spectrum follows (PL_Alpha_Hill).

    `1 + k / sum of ln(e_i / e_(k+1)) over i = 1..k`, of the eigenvalues e_1 >= e_2 >= ... > 0 of `W^T W`, k half of
    their number. Small means a heavy tail. NaN where the rank is below 2.

    Example:
        >>> round(tail_exponent(torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.5]))), 4)  # 1 + 2 / (ln 16 + ln 4)
        1.4809
    """
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    singular = torch.linalg.svdvals(weight).cpu().double()
    # Zero but for rounding, as in `torch.linalg.matrix_rank`.
    singular = singular[singular > singular[0] * max(weight.shape) * torch.finfo(weight.dtype).eps]
    k = len(singular) // 2
    if k == 0:
        return math.nan
    mean_log = 2 * float((singular[:k] / singular[k]).log().mean())
    return 1 + 1 / max(mean_log, _NO_TAIL)


_NO_TAIL = 1e-6  # equal singular values, as of an orthogonal matrix, have no tail and an infinite exponent
