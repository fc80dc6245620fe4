"""Zero what is not kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from wanda_lightning.core.criteria import Criterion
from wanda_lightning.core.patterns import Pattern
from wanda_lightning.core.solvers.base import Solver, masked
from wanda_lightning.core.statistics import InputStatistics
from wanda_lightning.core.types import KeepMask, Weight


@dataclass(frozen=True)
class ZeroOut(Solver):
    """Zero the pruned weights and leave the others exactly as they are."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(
        self,
        weight: Weight,
        inputs: InputStatistics | None,
        criterion: Criterion,
        pattern: Pattern,
        sparsity: float,
    ) -> tuple[Weight, KeepMask]:
        """Score, choose, zero."""
        keep = pattern(criterion(weight, inputs), sparsity)
        return masked(weight, keep), keep
