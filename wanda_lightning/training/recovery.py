"""The interface of a recovery, which trains the kept weights of a pruned model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch.nn import Module

from wanda_lightning.calibration.lockstep import Call
from wanda_lightning.calibration.samples import Samples
from wanda_lightning.models import Layer, Stop
from wanda_lightning.parallel import Processes
from wanda_lightning.report import TrainedPart, Training

Trained = tuple[TrainedPart, Sequence[Layer]]


class BlockRecovery:
    """The recovery of one block. The base class records nothing and trains nothing."""

    def record(self, calls: Iterable[Call]) -> Iterable[Call]:
        """Return calls of the dense block that record what training needs when each is run once."""
        return calls

    def train(self, show: Callable[[str], None]) -> Iterator[Trained]:
        """Train the kept weights of the pruned block; `show` the name of each part, and yield it with its layers."""
        return iter(())


class DenseModel(NamedTuple):
    """A model before any layer is pruned, and the data to train it on."""

    model: Module
    layers: Sequence[Layer]  # that will be pruned
    blocks: Sequence[Module]  # that contain these layers
    data: Samples
    processes: Processes
    progress: bool


class ModelRecovery:
    """The recovery of a whole model. The base class trains nothing."""

    def train(self) -> Training | None:
        """Train the kept weights of the pruned model; return what happened, or None if nothing was trained."""
        return None


class Recovery:
    """Trains the kept weights of each pruned block, of the whole model at the end, or both."""

    reads_batches: ClassVar[bool] = False  # whether it runs the calibration batches itself

    @property
    def needs(self) -> frozenset[str]:
        """The statistics that it reads. To train blocks it reads batches, which any statistic requires."""
        return frozenset({"square_sum"} if self.trains_blocks else ())

    @property
    def trains_blocks(self) -> bool:
        """Whether it records the hidden states of each token, to train blocks."""
        return False

    def for_model(self, is_image: bool, sequential: str) -> Recovery:
        """Return the recovery for a model."""
        return self

    def why_not(self, sequential: str) -> str | None:
        """Return why it cannot be combined with a value of `sequential`, and what to do; None if it can be."""
        if sequential != "layer" or not self.trains_blocks:  # stops are then single layers
            return None
        return "the recovery trains the parts of whole blocks. Use sequential='block' or 'none', or another recovery."

    def start(self, stop: Stop, processes: Processes) -> BlockRecovery:
        """Start the recovery at a stop that is still dense."""
        return BlockRecovery()

    def run_dense_model(self, dense: DenseModel) -> ModelRecovery:
        """Run the model before any layer is pruned, and record what training it as a whole needs."""
        return ModelRecovery()


@dataclass(frozen=True)
class NoRecovery(Recovery):
    """Leave the weights as the solver computed them."""
