"""The choices that decide which weights of one layer are kept."""

from __future__ import annotations

from dataclasses import dataclass

from wanda_lightning.core.criteria import Criterion
from wanda_lightning.core.patterns import Pattern
from wanda_lightning.core.statistics import InputStatistics
from wanda_lightning.core.types import KeepMask, Weight


@dataclass(frozen=True)
class Selection:
    """Criterion, pattern and sparsity of one layer.

    Attributes:
        criterion: Scores the weights.
        pattern: Turns the scores into what is kept.
        sparsity: Fraction of the layer's weights that become zero, in [0, 1).
    """

    criterion: Criterion
    pattern: Pattern
    sparsity: float

    def keep(self, weight: Weight, inputs: InputStatistics) -> KeepMask:
        """Return the mask of the weights to keep."""
        return self.pattern(self.criterion(weight, inputs), self.sparsity)
