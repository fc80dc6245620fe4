"""Set the pruned weights to zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from wanda_lightning.core.masking import masked
from wanda_lightning.core.selection import Selection
from wanda_lightning.core.solvers.base import Solver
from wanda_lightning.core.statistics import InputStatistics
from wanda_lightning.core.types import KeepMask, Weight


@dataclass(frozen=True)
class ZeroOut(Solver):
    """Set the pruned weights to zero and leave the others exactly as they are."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, weight: Weight, inputs: InputStatistics, selection: Selection) -> tuple[Weight, KeepMask]:
        """Score, choose, set to zero."""
        keep = selection.keep(weight, inputs)
        return masked(weight, keep), keep
