"""One pruning run: what is pruned, with which samples, where the weights are, and what has happened so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field

from wanda_lightning.calibration.lockstep import Visit, Visits, lockstep
from wanda_lightning.calibration.observer import Observation, StopObserver
from wanda_lightning.calibration.samples import Samples
from wanda_lightning.common.progress import ProgressBar
from wanda_lightning.common.wording import quantity
from wanda_lightning.core.allocation import Sparsities
from wanda_lightning.core.selection import Selection
from wanda_lightning.loop.plan import Plan, refuse_unprunable
from wanda_lightning.models import Layer, ReadWeight, SkippedMatrix, SkipReason
from wanda_lightning.report import BatchNormCorrection, PrunedLayer, Training

Restore = Callable[[Sequence[Layer]], None]
"""Gives layers the shapes that an interrupted run has written."""


class Clock(dict[str, float]):
    """Seconds by stage."""

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time of this block to a stage of the report."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self[stage] = self.get(stage, 0.0) + time.perf_counter() - started


@dataclass(frozen=True)
class KeptEntries:
    """Which entries of a tensor are kept along the dimension that has one for each expert."""

    dim: int
    indices: list[int]


@dataclass
class Done:
    """The records of the layers so far, by name. An error message uses them, too, so they are added at each write."""

    layers: dict[str, PrunedLayer] = field(default_factory=dict)  # in the order of pruning
    skipped: dict[str, SkippedMatrix] = field(default_factory=dict)  # left dense
    # Number of tokens of each expert that was pruned with the statistics of all experts of its module.
    few_tokens: dict[str, int] = field(default_factory=dict)
    # Hidden units that are zero, by the layer that reads them.
    zero_units: dict[str, int] = field(default_factory=dict)
    # What is left of the tensors that have lost experts.
    kept: dict[str, KeptEntries] = field(default_factory=dict)
    # Names of the stops that the model called after they were pruned.
    passed: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Run:
    """One pruning run. Each stage returns a new value with what it found."""

    plan: Plan
    samples: Samples
    store: WeightStore
    progress: bool = False  # whether to show bars
    clock: Clock = field(default_factory=Clock)
    done: Done = field(default_factory=Done)
    # How the weights of each layer are selected; empty until the sparsities are allocated.
    selections: Mapping[str, Selection] = field(default_factory=dict)
    # What one pass through the dense model showed of all layers; None if each stop is observed when it is reached.
    observation: Observation | None = None
    fallback: str = ""  # why the batches do not run in lockstep as asked; empty if they do
    not_corrected: str = ""  # why BatchNorm layers were not corrected; empty if they were
    batch_norm: BatchNormCorrection | None = None
    training: Training | None = None  # of the whole model

    def describe_progress(self) -> str:
        """Say, for an error, how many layers are pruned already; return nothing if none is."""
        if not self.done.layers:
            return ""
        pruned = quantity(len(self.done.layers), "layer is", "layers are")
        return f"{pruned} already pruned; the others are dense. {self.store.advice}"


class WeightStore:
    """All weights stay in memory."""

    zeros: int = 0  # among the weights that are not in memory
    advice: str = "Reload the model before you try again."  # if pruning fails halfway

    def check(self, layers: Sequence[Layer]) -> None:
        """Refuse weights that are in memory and cannot be pruned."""
        refuse_unprunable(layers)

    # The dense model, before anything is pruned

    def dense_visits(self, visits: Visits) -> Iterator[Visit]:
        """Yield the visits, each with the dense weights of its stop in memory."""
        yield from visits

    @contextmanager
    def dense_reader(self) -> Iterator[ReadWeight]:
        """Return a function that returns the dense weight of a layer, called in model order."""
        yield Layer.read

    def observe_dense(self, run: Run, observer: StopObserver, bar: ProgressBar) -> Observation:
        """Observe all layers in one pass of all samples through the dense model."""
        bar.expect(run.samples.length)
        return observer.whole_model(run.plan.whole_model, run.samples, bar.advance)

    # Sparsities that an interrupted run has chosen

    def stored_sparsities(self) -> Sparsities:
        """Return the sparsities that an earlier run has chosen; empty if there are none."""
        return {}

    def store_sparsities(self, sparsities: Sparsities) -> None:
        """Store the sparsities for a later run that continues this one."""

    # The model while it is pruned

    def visits(self, run: Run, bar: ProgressBar, restore: Restore) -> Generator[Visit]:
        """Yield each stop before it is pruned, with the calls that wait there. Once it is pruned, they run through it.

        No sample waits there if nothing is left to observe or to record. `restore` gives layers the shapes that they
        have after pruning: an interrupted run has pruned and written them.
        """
        plan = run.plan
        bar.expect(len(plan.stops))
        needs_calls = plan.config.recovery.trains_blocks or not plan.is_one_pass
        if not (plan.observed and needs_calls):
            for stop in plan.stops:
                yield Visit(stop, [])
                bar.advance()
            return

        samples = run.samples.in_memory()
        with closing(lockstep(plan.stops, samples, plan.processes, model=plan.model)) as visits:
            run.done.passed = visits.passed
            for visit in visits:
                yield visit
                bar.advance()

    def finish(self, run: Run) -> None:
        """Write what is left, after the last stop."""


def unreached(layer: Layer) -> SkippedMatrix:
    """Return the record of a layer that no calibration batch called."""
    return SkippedMatrix(
        layer.name, layer.stored_shape, SkipReason.UNREACHED, "no calibration batch called it"
    )
