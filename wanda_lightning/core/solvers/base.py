"""What every solver promises."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from wanda_lightning.core.criteria import Criterion, Group, Wanda
from wanda_lightning.core.selection import Selection
from wanda_lightning.core.statistics import InputStatistics
from wanda_lightning.core.types import KeepMask, OneMask, OneWeight, Weight


def _as_integers(tensor: Tensor) -> Tensor:
    """The same memory as integers, which times 0 or 1 are exact: NaN and -0.0 become 0.0."""
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def as_numbers(flags: Tensor) -> Tensor:
    """The same memory as 1 and 0: what PyTorch makes of booleans takes ten times as long on a CPU."""
    return flags.view(torch.int8)


def masked(tensor: Tensor, where: Tensor) -> Tensor:
    """A new tensor with the numbers where the flags are True, exactly, and 0.0 elsewhere, whatever was there."""
    bits = _as_integers(tensor)
    return as_numbers(where).to(bits.dtype).mul_(bits).view(tensor.dtype)


def mask_(tensor: Tensor, where: Tensor) -> None:
    """As `only`, in place."""
    bits = _as_integers(tensor)
    bits.mul_(as_numbers(where).to(bits.dtype))


class Solver(ABC):
    """What becomes of a weight matrix."""

    @property
    @abstractmethod
    def needs(self) -> frozenset[str]:
        """The statistics that it reads, besides those of the criterion."""

    @property
    def takes_any_criterion(self) -> bool:
        """Whether another criterion than its own may choose."""
        return True

    @property
    def own_criterion(self) -> Criterion:
        """What chooses the weights where the user names no criterion."""
        return Wanda()

    def group(self, criterion: Criterion) -> Group:
        """What unstructured pruning compares by default: the weights of a row, or of the layer."""
        return criterion.group

    @abstractmethod
    def __call__(self, weight: Weight, inputs: InputStatistics, selection: Selection) -> tuple[Weight, KeepMask]:
        """Give the new weight, in the old one's dtype and zero where not kept, and what was kept."""

    def solve_together(
        self, weights: Sequence[OneWeight], inputs: InputStatistics, selections: Sequence[Selection]
    ) -> list[tuple[OneWeight, OneMask]]:
        """What becomes of several matrices that have the same inputs, such as queries, keys and values.

        Args:
            weights: All of the same width.
            inputs: Of each.
            selections: One for each.
        """
        return [self(weight, inputs, selection) for weight, selection in zip(weights, selections, strict=True)]
