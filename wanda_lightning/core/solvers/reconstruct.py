"""Choose with another solver, then train what is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from wanda_lightning.core.criteria import Criterion, Group
from wanda_lightning.core.selection import Selection
from wanda_lightning.core.solvers.base import Solver
from wanda_lightning.core.solvers.zero_out import ZeroOut
from wanda_lightning.core.statistics import InputStatistics
from wanda_lightning.core.types import KeepMask, OneMask, OneWeight, Weight


@dataclass(frozen=True)
class Reconstruct(Solver):
    """Prune each layer with another solver, then train the kept weights of each part of a block together.

    The attention and the MLP of a block, each for itself, learn to give again what they gave before the block was
    pruned, on what entered them then: Adam on the squared error, with the mask fixed. Every fourth calibration batch
    is held out (from four batches on); when the error on these stops falling, the weights of before are taken. Where
    layers lie in the block itself and not in a part of it, the block is trained as a whole. For sequential `block`,
    whose batches and outputs are all held while a block is trained.

    Attributes:
        solver: Gives the mask and the first values.
        epochs: Passes over the calibration batches, at the most.
        learning_rate: Of Adam, in units of the root mean square of the layer's kept weights.
    """

    solver: Solver = field(default_factory=ZeroOut)
    epochs: int = 4
    learning_rate: float = 0.01

    def __post_init__(self) -> None:
        if self.epochs < 1 or not self.learning_rate > 0 or isinstance(self.solver, Reconstruct):
            raise ValueError(
                "Reconstruct needs epochs >= 1, learning_rate > 0 and a solver that is not Reconstruct itself, "
                f"but got {self}"
            )

    @property
    def needs(self) -> frozenset[str]:
        """Calibration batches, also where the other solver needs none."""
        return self.solver.needs | {"square_sum"}

    @property
    def takes_any_criterion(self) -> bool:
        """As the other solver."""
        return self.solver.takes_any_criterion

    @property
    def own_criterion(self) -> Criterion:
        """That of the other solver."""
        return self.solver.own_criterion

    def group(self, criterion: Criterion) -> Group:
        """As the other solver."""
        return self.solver.group(criterion)

    def __call__(self, weight: Weight, inputs: InputStatistics, selection: Selection) -> tuple[Weight, KeepMask]:
        """What the other solver gives, to be trained when all layers of the block have it (`reconstruction.train`)."""
        return self.solver(weight, inputs, selection)

    def solve_together(
        self, weights: Sequence[OneWeight], inputs: InputStatistics, selections: Sequence[Selection]
    ) -> list[tuple[OneWeight, OneMask]]:
        """As the other solver."""
        return self.solver.solve_together(weights, inputs, selections)
