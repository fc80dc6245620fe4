"""Outlier weighed layerwise sparsity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from wanda_lightning.core.allocation.base import Allocation, DenseLayer
from wanda_lightning.core.allocation.groups import (
    Per,
    group_of,
    groups_of,
    refuse_one_group,
    refuse_unknown,
    unit_range,
)
from wanda_lightning.core.allocation.match_target import match_target
from wanda_lightning.core.criteria import Wanda
from wanda_lightning.core.types import Score


@dataclass(frozen=True)
class OWL(Allocation):
    """Less sparsity where more of Wanda's scores are outliers (Yin et al. 2024).

    A score is an outlier where it is above `m` times the mean score of its block. With D the fraction of outliers of
    a block, scaled to [0, 2 lambda] over all blocks, the block gets `target - (D - mean of D)`. The scores are those
    of the dense model.

    Attributes:
        m: How many times the mean an outlier is.
        lambda_: Half of how far apart the sparsities of two blocks may be.
        per: Whether all layers of a block get one sparsity (the paper's choice), or each its own.
    """

    needs: ClassVar[frozenset[str]] = Wanda.needs
    m: float = 5.0
    lambda_: float = 0.08
    per: Per = "block"

    def __post_init__(self) -> None:
        if not self.m > 0 or not 0 <= self.lambda_ <= 0.5:
            raise ValueError(
                f"OWL needs m > 0 and lambda_ in [0, 0.5], but m={self.m} and lambda_={self.lambda_} were given"
            )
        refuse_unknown(self.per)

    def check(self, layers: Sequence[DenseLayer], sparsity: float) -> None:
        """Refuse a model with one block."""
        refuse_one_group(self, layers, self.per)

    def scaled(self, share: float) -> OWL:
        """Blocks differ by the same share of what they do in the end."""
        return replace(self, lambda_=self.lambda_ * share)

    def __call__(self, layers: Sequence[DenseLayer], sparsity: float) -> dict[str, float]:
        """Compare the blocks' outliers."""
        outliers = unit_range({group: self._outliers(inside) for group, inside in groups_of(layers, self.per).items()})
        wanted = {layer.name: -2 * self.lambda_ * outliers[group_of(layer, self.per)] for layer in layers}
        return match_target(layers, wanted, sparsity)

    def _outliers(self, layers: Sequence[DenseLayer]) -> float:
        """The fraction of scores above `m` times their mean, over all these layers."""
        size = sum(layer.size for layer in layers)
        mean = math.fsum(float(_scores(layer).sum()) for layer in layers) / size
        return sum(int((_scores(layer) > self.m * mean).count_nonzero()) for layer in layers) / size


def _scores(layer: DenseLayer) -> Score:
    """Wanda's, per token: layers of one block may have seen different numbers of tokens."""
    return Wanda()(layer.read(), layer.inputs).div_(layer.inputs.count**0.5)
