"""Sparsity from the outliers among Wanda's scores: outlier weighed layerwise sparsity (OWL)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from wanda_lightning.common.checks import Number, check
from wanda_lightning.core.allocation.allocation import Allocation, DenseLayer
from wanda_lightning.core.allocation.groups import PER, Per, group_of, groups_of, refuse_one_group, unit_range
from wanda_lightning.core.allocation.match_target import match_target
from wanda_lightning.core.criteria import Wanda
from wanda_lightning.core.types import Score


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

    def check(self, layers: Sequence[DenseLayer], sparsity: float) -> None:
        """Refuse a model with a single block."""
        refuse_one_group(self, layers, self.per)

    def scaled(self, fraction: float) -> OWL:
        """Scale the differences between blocks."""
        return replace(self, lambda_=self.lambda_ * fraction)

    def __call__(self, layers: Sequence[DenseLayer], sparsity: float) -> dict[str, float]:
        """Compare the outliers of the blocks."""
        outliers = unit_range({group: self._outliers(inside) for group, inside in groups_of(layers, self.per).items()})
        wanted = {layer.name: -2 * self.lambda_ * outliers[group_of(layer, self.per)] for layer in layers}
        return match_target(layers, wanted, sparsity)

    def _outliers(self, layers: Sequence[DenseLayer]) -> float:
        """The fraction of scores above `m` times their mean, over all these layers."""
        size = sum(layer.size for layer in layers)
        mean = math.fsum(float(_scores(layer).sum()) for layer in layers) / size
        return sum(int((_scores(layer) > self.m * mean).count_nonzero()) for layer in layers) / size


def _scores(layer: DenseLayer) -> Score:
    # Per token, since the layers of a block may have seen different numbers of tokens.
    return Wanda()(layer.read(), layer.inputs).div_(layer.inputs.count**0.5)
