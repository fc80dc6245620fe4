"""The interface of every solver."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from wanda_lightning.core.criteria import Criterion, Group, Wanda
from wanda_lightning.core.selection import Selection
from wanda_lightning.core.statistics import InputStatistics
from wanda_lightning.core.types import KeepMask, OneMask, OneWeight, Weight


class Solver(ABC):
    """Computes the final weights of a layer, zeros included.

    Attributes:
        needs: The input statistics that it reads, besides those of the criterion.
        takes_any_criterion: Whether the user may choose the criterion.
    """

    needs: ClassVar[frozenset[str]]
    takes_any_criterion: ClassVar[bool] = True

    @property
    def own_criterion(self) -> Criterion:
        """The default criterion."""
        return Wanda()

    def group(self, criterion: Criterion) -> Group:
        """Return what unstructured pruning compares by default: the weights of a row, or those of the layer."""
        return criterion.group

    @abstractmethod
    def __call__(self, weight: Weight, inputs: InputStatistics, selection: Selection) -> tuple[Weight, KeepMask]:
        """Return the final weight, in the same dtype and 0 where it is not kept, and the mask of what is kept."""

    def solve_together(
        self, weights: Sequence[OneWeight], inputs: InputStatistics, selections: Sequence[Selection]
    ) -> list[tuple[OneWeight, OneMask]]:
        """Solve several layers with the same inputs, such as queries, keys and values.

        Args:
            weights: The weight of each layer; all have the same width.
            inputs: The statistics of their inputs.
            selections: The selection of each layer.

        Returns:
            For each layer what a call would return.
        """
        return [self(weight, inputs, selection) for weight, selection in zip(weights, selections, strict=True)]
