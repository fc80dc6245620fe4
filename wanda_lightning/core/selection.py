"""What decides which weights of one layer are kept."""

from __future__ import annotations

from dataclasses import dataclass

from wanda_lightning.core.criteria import Criterion
from wanda_lightning.core.patterns import Pattern
from wanda_lightning.core.statistics import InputStatistics
from wanda_lightning.core.types import KeepMask, Weight


@dataclass(frozen=True)
class Selection:
    """Criterion, pattern and sparsity (the fraction of weights that become zero, in [0, 1)) of one layer."""

    criterion: Criterion
    pattern: Pattern
    sparsity: float

    def keep(self, weight: Weight, inputs: InputStatistics) -> KeepMask:
        """Score the weights, and return the mask of those to keep."""
        return self.pattern(self.criterion(weight, inputs), self.sparsity)
