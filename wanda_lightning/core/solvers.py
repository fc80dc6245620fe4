"""Solvers give the final weights of a layer, zeros included.

A solver gets criterion *and* pattern, because some choose and update column block by column block; "score, keep, zero"
is the special case `ZeroOut`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from wanda_lightning.core.criteria import Criterion
from wanda_lightning.core.patterns import Pattern
from wanda_lightning.core.statistics import InputStatistics
from wanda_lightning.core.types import KeepMask, Weight


def as_integers(tensor: Tensor) -> Tensor:
    """The same memory as integers, which times 0 or 1 are exact: NaN and -0.0 become 0.0.

    On a CPU that is also ten times as fast as `masked_fill_`.
    """
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


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
        bits = as_integers(weight)
        return keep.to(bits.dtype).mul_(bits).view(weight.dtype), keep


SOLVERS: dict[str, type[Solver]] = {"zero_out": ZeroOut}
