"""Solvers give the final weights of a layer, zeros included.

A solver gets criterion *and* pattern, because some choose and update column block by column block; "score, keep, zero"
is the special case `ZeroOut`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from wanda_lightning.core.criteria import Criterion
from wanda_lightning.core.patterns import Pattern
from wanda_lightning.core.statistics import InputStatistics
from wanda_lightning.core.types import KeepMask, Weight


class Solver(ABC):
    """What becomes of a weight matrix."""

    needs: ClassVar[frozenset[str]]

    @abstractmethod
    def __call__(
        self,
        weight: Weight,
        inputs: InputStatistics | None,
        criterion: Criterion,
        pattern: Pattern,
        sparsity: float,
    ) -> tuple[Weight, KeepMask]:
        """Give the new weight, in the old one's dtype and zero where not kept, and what was kept."""


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
        # On a CPU a product of equal dtypes takes a third of masked_fill's time; adding 0 makes 0.0 of -0.0.
        return keep.to(weight.dtype).mul_(weight).add_(0.0), keep


SOLVERS: dict[str, type[Solver]] = {"zero_out": ZeroOut}
