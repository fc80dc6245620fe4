"""OWL: less sparsity where the dense model has more outliers among Wanda's scores."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from operator import attrgetter

from wanda_lightning.common.checks import Number, check
from wanda_lightning.common.grouping import grouped
from wanda_lightning.core.allocation.allocation import (
    Allocation,
    DenseLayer,
    Layers,
    Sparsities,
    match_target,
    total_size,
)
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
    """

    needs = Wanda.needs
    m: float = 5.0
    lambda_: float = 0.08

    def __post_init__(self) -> None:
        lambda_ = Number(minimum=0, maximum=0.5)
        check(self, m=Number(above=0), lambda_=lambda_)

    def scaled(self, fraction: float) -> OWL:
        """Scale the differences between blocks."""
        return replace(self, lambda_=self.lambda_ * fraction)

    def __call__(self, layers: Layers, sparsity: float) -> Sparsities:
        """Give less sparsity to blocks with more outliers."""
        groups = grouped(layers, attrgetter("block"))

        fractions = [self._outliers(members) for members in groups.values()]
        lowest = min(fractions)
        spread = max(fractions) - lowest
        # Minus the D of the class: `match_target` shifts all by one amount, which subtracts the mean.
        wanted = {}
        for members, fraction in zip(groups.values(), fractions, strict=True):
            relative = (fraction - lowest) / (spread or 1.0)
            for layer in members:
                wanted[layer.name] = -2 * self.lambda_ * relative
        return match_target(layers, wanted, sparsity)

    def _outliers(self, layers: Layers) -> float:
        """Return the fraction of scores above `m` times their mean, over all these layers."""
        size = total_size(layers)
        # The scores are computed twice: those of a whole block might not fit into memory.
        mean = math.fsum(float(_scores(layer).sum()) for layer in layers) / size
        outliers = [int((_scores(layer) > self.m * mean).count_nonzero()) for layer in layers]
        return sum(outliers) / size


def _scores(layer: DenseLayer) -> Score:
    # Per token, since the layers of a block may have seen different numbers of tokens.
    return Wanda()(layer.read(), layer.inputs).div_(layer.inputs.count**0.5)
