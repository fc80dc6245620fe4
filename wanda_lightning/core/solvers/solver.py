"""The interface of solvers, and the simplest one."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from wanda_lightning.core.criteria import Criterion, Group, Wanda
from wanda_lightning.core.masking import masked
from wanda_lightning.core.selection import Selection
from wanda_lightning.core.statistics import InputStatistics
from wanda_lightning.core.types import OneSolved, OneWeight, Solved, Weight


class Solver(ABC):
    """Computes the final weights of a layer, zeros included.

    Attributes:
        needs: The input statistics that it reads, in addition to those of the criterion.
        takes_any_criterion: Whether the user may choose the criterion.
        intercept: Whether the bias of a layer, if it has one, is fitted together with the weights. The solver then gets
            `InputStatistics.centered()`.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    takes_any_criterion: ClassVar[bool] = True
    intercept: bool = False

    @property
    def chooses_in_blocks(self) -> bool:
        """Whether it chooses weights in one block of columns after another, from the columns of the block only."""
        return False

    @property
    def own_criterion(self) -> Criterion:
        """The default criterion."""
        return Wanda()

    def group(self, criterion: Criterion) -> Group:
        """Return where unstructured pruning compares weights by default: within a row or within the layer."""
        return criterion.group

    @abstractmethod
    def __call__(self, weight: Weight, inputs: InputStatistics, selection: Selection) -> Solved:
        """Return the final weight, in the dtype of the given one, and the mask of the weights that are kept."""

    def solve_together(
        self, weights: Sequence[OneWeight], inputs: InputStatistics, selections: Sequence[Selection]
    ) -> list[OneSolved]:
        """Solve several layers with the same inputs, such as queries, keys and values; equals a call for each."""
        return [
            self(weight, inputs, selection)
            for weight, selection in zip(weights, selections, strict=True)
        ]


@dataclass(frozen=True)
class ZeroOut(Solver):
    """Set the pruned weights to zero and leave the others exactly as they are."""

    def __call__(self, weight: Weight, inputs: InputStatistics, selection: Selection) -> Solved:
        """Choose, then set to zero."""
        keep = selection.keep(weight, inputs)
        return masked(weight, keep), keep
