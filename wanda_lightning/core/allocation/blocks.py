"""Sparsity of each block from the outliers among Wanda's scores (OWL), or from the spectra of the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import ClassVar

import torch

from wanda_lightning.common.checks import Number, check
from wanda_lightning.core.allocation.allocation import PER, Allocation, DenseLayer, Per, Uniform, groups_of, unit_range
from wanda_lightning.core.allocation.match_target import match_target, mean_of
from wanda_lightning.core.criteria import Wanda
from wanda_lightning.core.types import Score, Weight


@dataclass(frozen=True)
class OWL(Allocation):
    """Less sparsity where more of Wanda's scores are outliers (Yin et al. 2024).

    A score of the dense model is an outlier if it exceeds `m` times the mean score of its block. The fractions of
    outliers of all blocks are mapped linearly to [0, 2 lambda]. A block with the value D gets
    `target - (D - mean of D)`.

    Attributes:
        m: Threshold of an outlier, as a multiple of the mean score.
        lambda_: Half of the maximum difference between the sparsities of two blocks.
        per: Whether all layers of a block get the same sparsity (the paper's choice), or each layer its own.
    """

    needs: ClassVar[frozenset[str]] = Wanda.needs
    m: float = 5.0
    lambda_: float = 0.08
    per: Per = "block"

    def __post_init__(self) -> None:
        check(self, m=Number(above=0), lambda_=Number(minimum=0, maximum=0.5), per=PER)

    def scaled(self, fraction: float) -> OWL:
        """Scale the differences between blocks."""
        return replace(self, lambda_=self.lambda_ * fraction)

    def __call__(self, layers: Sequence[DenseLayer], sparsity: float) -> dict[str, float]:
        """Compare the outliers of the blocks."""
        outliers = unit_range({group: self._outliers(inside) for group, inside in groups_of(layers, self.per).items()})
        wanted = {layer.name: -2 * self.lambda_ * outliers[layer.group(self.per)] for layer in layers}
        return match_target(layers, wanted, sparsity)

    def _outliers(self, layers: Sequence[DenseLayer]) -> float:
        """The fraction of scores above `m` times their mean, over all these layers."""
        size = sum(layer.size for layer in layers)
        mean = math.fsum(float(_scores(layer).sum()) for layer in layers) / size
        return sum(int((_scores(layer) > self.m * mean).count_nonzero()) for layer in layers) / size


def _scores(layer: DenseLayer) -> Score:
    # Per token, since the layers of a block may have seen different numbers of tokens.
    return Wanda()(layer.read(), layer.inputs).div_(layer.inputs.count**0.5)


@dataclass(frozen=True)
class AlphaPruning(Allocation):
    """Less sparsity where the spectrum of the weights has a heavier tail, a sign of better training (Lu et al. 2024).

    The exponent of a block is the mean `tail_exponent` of its matrices. The exponents are mapped linearly to
    [1 - epsilon, 1 + epsilon] and multiplied by one factor that makes their mean the target. Needs no data.

    Attributes:
        epsilon: Maximum relative deviation from the mean.
        per: Whether all layers of a block get the same sparsity (the paper's choice), or each layer its own.
    """

    epsilon: float = 0.3
    per: Per = "block"

    def __post_init__(self) -> None:
        check(self, epsilon=Number(minimum=0, below=1), per=PER)

    def __call__(self, layers: Sequence[DenseLayer], sparsity: float) -> dict[str, float]:
        """Compare the spectra of the blocks."""
        groups = groups_of(layers, self.per)
        each = {group: [tail_exponent(layer.read()) for layer in inside] for group, inside in groups.items()}
        known = {group: fmean(finite) for group, all_ in each.items() if (finite := list(filter(math.isfinite, all_)))}
        if not known:
            return Uniform()(layers, sparsity)
        exponents = unit_range({group: known.get(group, fmean(known.values())) for group in groups})
        wanted = {
            layer.name: 1 - self.epsilon + 2 * self.epsilon * exponents[layer.group(self.per)] for layer in layers
        }
        scale = sparsity / mean_of(layers, wanted)
        return match_target(layers, {name: scale * value for name, value in wanted.items()}, sparsity)


_MIN_LOG = 1e-6  # the singular values of an orthogonal matrix are equal: there is no tail, the exponent is infinite


def tail_exponent(weight: Weight) -> float:
    """Return Hill's estimate of the power law exponent of the upper half of the spectrum (PL_Alpha_Hill).

    `1 + k / sum of ln(e_i / e_(k+1)) over i = 1..k`, with the eigenvalues e_1 >= e_2 >= ... > 0 of `W^T W` and k half
    of their number. A small exponent means a heavy tail. NaN if the rank is below 2.

    Example:
        >>> round(tail_exponent(torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.5]))), 4)  # 1 + 2 / (ln 16 + ln 4)
        1.4809
    """
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    singular = torch.linalg.svdvals(weight).cpu().double()
    # Drop values that are zero up to rounding, as `torch.linalg.matrix_rank` does.
    singular = singular[singular > singular[0] * max(weight.shape) * torch.finfo(weight.dtype).eps]
    k = len(singular) // 2
    if k == 0:
        return math.nan
    mean_log = 2 * float((singular[:k] / singular[k]).log().mean())
    return 1 + 1 / max(mean_log, _MIN_LOG)
