"""The interface of a recovery, and the recovery that does nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from wanda_lightning.calibration.lockstep import Call
from wanda_lightning.calibration.samples import Samples
from wanda_lightning.common.errors import UserError
from wanda_lightning.models import Layer, Unit
from wanda_lightning.parallel import SINGLE_PROCESS, Processes
from wanda_lightning.report import TrainedPart, Training


class UnitRecovery:
    """The recovery of one unit. The base class records nothing and trains nothing."""

    def record(self, calls: Iterable[Call]) -> Iterable[Call]:
        """Return calls of the dense unit that record what training needs when each is run once."""
        return calls

    def train(self, show: Callable[[str], None]) -> Iterator[tuple[TrainedPart, Sequence[Layer]]]:
        """Train the kept weights of the pruned unit; yield each part with its layers.

        `show` is called with the name of each part before it is trained.
        """
        return iter(())


@dataclass(frozen=True)
class DenseModel:
    """A model before any layer is pruned, and the data to train it on."""

    model: nn.Module
    layers: Sequence[Layer]  # that will be pruned
    blocks: Sequence[nn.Module]  # that contain these layers
    data: Samples
    processes: Processes
    progress: bool


class ModelRecovery:
    """The recovery of a whole model. The base class trains nothing."""

    def train(self) -> Training | None:
        """Train the kept weights of the pruned model; return what happened, or None if nothing was trained."""
        return None


class Recovery:
    """Trains the kept weights of each pruned unit, of the whole model at the end, or both."""

    reads_batches: ClassVar[bool] = False  # whether it runs the calibration batches itself

    @property
    def needs(self) -> frozenset[str]:
        """The statistics that it reads; if there are any, calibration batches are required."""
        return frozenset()

    @property
    def recorded(self) -> int:
        """Number of hidden states of each token that it records while it trains a block; 0 if it trains no blocks."""
        return 0

    def for_model(self, is_image: bool, sequential: str) -> Recovery:
        """Return the recovery for a model."""
        return self

    def why_not(self, sequential: str) -> str | None:
        """Return why it cannot be combined with a value of `sequential`, and what to do; None if it can be."""
        return None

    def check_sharded(self) -> None:
        """Raise a ValueError if the recovery does not support sharded models."""
        raise UserError(
            f"recovery={type(self).__name__}() trains a model that each process holds as a whole, but this one is "
            "sharded. Prune without recovery, and train with DistillFromDense in Trainer.fit; or prune before sharding "
            "(devices=1)."
        )

    def start(self, unit: Unit, processes: Processes = SINGLE_PROCESS) -> UnitRecovery:
        """Start the recovery of a unit that is still dense."""
        return UnitRecovery()

    def start_model(self, dense: DenseModel) -> ModelRecovery:
        """Start the recovery of a whole model before any layer is pruned."""
        return ModelRecovery()


@dataclass(frozen=True)
class NoRecovery(Recovery):
    """Leave the weights as the solver computed them."""

    def check_sharded(self) -> None:
        """Accept sharded models."""
