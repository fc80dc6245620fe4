"""One pruning run: what is pruned, with which samples and weights, and what has happened so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from wanda_lightning.calibration.samples import Samples
from wanda_lightning.core.statistics import GradientStatistics, InputStatistics
from wanda_lightning.engine.plan import Plan, Selections
from wanda_lightning.models import Layer, SkippedMatrix, SkipReason
from wanda_lightning.report import BatchNormCorrection, Permuted, PrunedLayer, Training

if TYPE_CHECKING:
    from wanda_lightning.engine.store import WeightStore

Observed = tuple[Mapping[str, InputStatistics], Mapping[str, GradientStatistics]]


@dataclass
class Run:
    """One pruning run.

    Attributes:
        plan: The layers, their units, and the choices.
        samples: The calibration samples of this process.
        store: Where the weights are.
        progress: Whether to show bars.
        seconds: Time by stage.
        selections: The sparsity, criterion and pattern of each layer; empty until they are allocated.
        layers: The pruned layers by name, in the order in which they were pruned.
        skipped: Layers that were left dense, by name.
        few_tokens: Number of tokens of each expert that was pruned with the statistics of all experts of its module.
        revisited: Indices of units that the model called again after they were pruned.
        batch_norm: The correction of BatchNorm layers; None if there was none.
        not_corrected: Why the model's BatchNorm layers were not corrected; empty if it has none, or they were.
        permuted: The permutation of hidden units; None if there was none.
        training: The training of the whole model; None if there was none.
    """

    plan: Plan
    samples: Samples
    store: WeightStore
    progress: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    selections: Selections = field(default_factory=dict)
    layers: dict[str, PrunedLayer] = field(default_factory=dict)
    skipped: dict[str, SkippedMatrix] = field(default_factory=dict)
    few_tokens: dict[str, int] = field(default_factory=dict)
    revisited: set[int] = field(default_factory=set)
    batch_norm: BatchNormCorrection | None = None
    not_corrected: str = ""
    permuted: Permuted | None = None
    training: Training | None = None

    def allocate(self, observe: Callable[[], Observed]) -> None:
        """Give each layer its sparsity, from what `observe` finds in the dense model, or as an earlier run did."""
        self.selections = self.store.recall(self.plan)
        if self.selections:
            self.samples.count()
            return
        found = observe()
        with self.store.dense():
            self.selections = self.plan.allocate(*found, self.progress, self.store.hold)
        self.store.keep(self.selections)

    def timed(self, stage: str, is_reported: bool = True) -> AbstractContextManager[None]:
        """Add the time of this block to a stage of the report; a stage that does nothing is left out."""
        return timed(self.seconds, stage, is_reported)

    def written(self) -> str:
        """Say, for an error, which layers are pruned already; return nothing if none is."""
        if not (names := list(self.layers)):
            return ""
        layers = f"{len(names)} layers are already pruned, from {names[0]} to {names[-1]}; the others are dense. "
        return layers + self.store.advice


@contextmanager
def timed(seconds: dict[str, float], stage: str, is_reported: bool = True) -> Iterator[None]:
    """Add the time of this block to a stage."""
    started = time.perf_counter()
    try:
        yield
    finally:
        if is_reported:
            seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - started


def unreached(layer: Layer) -> SkippedMatrix:
    """Return the record of a layer that no calibration batch called."""
    return SkippedMatrix(layer.name, layer.stored_shape, SkipReason.UNREACHED, "no calibration batch called it")
