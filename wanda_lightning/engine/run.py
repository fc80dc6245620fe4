"""One pruning run: what is pruned, with which samples, where the weights are, and what has happened so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn

from wanda_lightning.calibration.lockstep import Call, Stop, lockstep
from wanda_lightning.calibration.observer import Observer
from wanda_lightning.calibration.samples import Samples
from wanda_lightning.common.progress import ProgressBar
from wanda_lightning.config import PruningConfig
from wanda_lightning.core.statistics import GradientStatistics, InputStatistics
from wanda_lightning.engine.plan import Plan, Selections, make_plan
from wanda_lightning.models import Layer, SkippedMatrix, SkipReason, Unit
from wanda_lightning.parallel import Processes
from wanda_lightning.report import BatchNormCorrection, Permuted, PrunedLayer, Training

Observed = tuple[Mapping[str, InputStatistics], Mapping[str, GradientStatistics]]


@dataclass
class Run:
    """One pruning run. Dictionaries of layers and experts have their names as keys."""

    plan: Plan
    samples: Samples
    store: WeightStore
    progress: bool = False  # whether to show bars
    seconds: dict[str, float] = field(default_factory=dict)  # by stage
    selections: Selections = field(default_factory=dict)  # empty until the sparsities are allocated
    layers: dict[str, PrunedLayer] = field(default_factory=dict)  # in the order in which they were pruned
    skipped: dict[str, SkippedMatrix] = field(default_factory=dict)  # layers that were left dense
    # Number of tokens of each expert that was pruned with the statistics of all experts of its module.
    few_tokens: dict[str, int] = field(default_factory=dict)
    zero_units: dict[str, int] = field(default_factory=dict)  # hidden units that are zero, by the layer that reads them
    revisited: set[str] = field(default_factory=set)  # names of units that the model called again after pruning
    batch_norm: BatchNormCorrection | None = None
    not_corrected: str = ""  # why BatchNorm layers were not corrected; empty if they were, or there are none
    permuted: Permuted | None = None
    training: Training | None = None  # of the whole model

    def allocate(self, observe: Callable[[], Observed]) -> None:
        """Give each layer its sparsity, from what `observe` finds in the dense model, or as an earlier run did."""
        with self.plan.processes.fail_together():
            self.selections = self.store.recall(self.plan)
        if self.selections:
            self.samples.count()
            return
        found = observe()
        with self.store.dense():
            self.selections = self.plan.allocate(*found, self.progress, self.store.hold)
        self.store.keep(self.selections)

    @contextmanager
    def timed(self, stage: str, is_reported: bool = True) -> Iterator[None]:
        """Add the time of this block to a stage of the report; a stage that does nothing is left out."""
        started = time.perf_counter()
        try:
            yield
        finally:
            if is_reported:
                self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started

    def written(self) -> str:
        """Say, for an error, which layers are pruned already; return nothing if none is."""
        if not (names := list(self.layers)):
            return ""
        pruned = f"{len(names)} layers are already pruned, from {names[0]} to {names[-1]}"
        if len(names) == 1:
            pruned = f"{names[0]} is already pruned"
        return f"{pruned}; the others are dense. {self.store.advice}"


def unreached(layer: Layer) -> SkippedMatrix:
    """Return the record of a layer that no calibration batch called."""
    return SkippedMatrix(layer.name, layer.stored_shape, SkipReason.UNREACHED, "no calibration batch called it")


class UnitStop(NamedTuple):
    """A unit that is about to be pruned, with the statistics of its layers; None if its calls shall be observed."""

    unit: Unit
    inputs: Mapping[str, InputStatistics] | None
    calls: Sequence[Call] = ()  # of all samples that wait there


class WeightStore:
    """All weights and activations stay in memory."""

    zeros: int = 0  # among the weights that are not in memory
    advice: str = "Reload the model before you try again."  # if pruning fails halfway

    def plan(self, config: PruningConfig, model: nn.Module, processes: Processes) -> Plan:
        """Find what will be pruned."""
        return make_plan(config, model, processes)

    # ------------------------------------------------------------------------------------------------------- passes

    def observe_dense(self, run: Run, observer: Observer, bar: ProgressBar) -> Mapping[str, InputStatistics]:
        """Return the statistics of all layers, from one pass of all samples through the dense model."""
        bar.expect(run.samples.length)
        return observer.whole_model(run.plan.whole_model, run.samples, bar.advance)

    def stops(self, run: Run, observer: Observer, bar: ProgressBar) -> Generator[UnitStop]:
        """Stop at each unit before it is pruned; after each stop the samples run through the pruned unit."""
        plan, revisited, length = run.plan, run.revisited, 0 if not run.plan.is_one_pass else run.samples.length
        inputs: Mapping[str, InputStatistics] | None = None if plan.observed else {}
        if plan.is_one_pass:
            inputs, revisited = self.observe_dense(run, observer, bar), set()
        bar.expect(None if length is None else length + len(plan.units))
        if plan.observed and (plan.config.recovery.recorded or not plan.is_one_pass):
            for unit, calls in lockstep(plan.units, run.samples.hold(), plan.processes, revisited):
                yield UnitStop(unit, inputs, calls)
                bar.advance()
            return
        for unit in plan.units:
            yield UnitStop(unit, inputs)
            bar.advance()

    # ------------------------------------------------------------------------------------------------------ weights

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Give access to the weights before pruning, in one pass through the model in this block."""
        yield

    def hold(self, name: str) -> None:
        """Load the dense weights of a layer or a unit."""

    def repeat(self, block: str, change: Callable[[], None]) -> None:
        """Apply `change`, which the dense weights of a block have seen, again each time they are read."""

    def undo(self, change: Callable[[], None]) -> None:
        """Call `change`, which takes back a change of the dense weights of a block after their pass."""
        change()

    # ------------------------------------------------------------------------------------------------- interrupted runs

    def recall(self, plan: Plan) -> Selections:
        """Return the selections that an earlier run has made; empty if there are none."""
        return {}

    def keep(self, selections: Selections) -> None:
        """Keep the selections for a later run that continues this one."""

    def arrive(self, unit: Unit, run: Run) -> bool:
        """Prepare a unit that is about to be pruned; return whether an earlier run has pruned it already."""
        return False

    def finish(self, run: Run) -> None:
        """Store what is left, after the last unit."""


def dense_blocks(run: Run, blocks: Sequence[Unit], count: int, title: str, again: set[str]) -> Generator[Stop]:
    """Stop at each block, whose weights are in memory then.

    The samples are the first `count` of all processes together. After the last block, `again` receives the names of
    those that a sample of any process has reached more than once: the later calls may use a block in another way.
    """
    store, plan, revisited = run.store, run.plan, set[str]()
    samples = run.samples.head(count)
    if not any(number for (number,) in plan.processes.all_gather([len(samples)])):
        run.samples.refuse_if_empty()
    with ProgressBar(title, len(blocks), run.progress) as bar, store.dense():
        for stop in lockstep(blocks, samples, plan.processes, revisited):
            bar.show(stop.unit.name)
            store.hold(stop.unit.name)
            yield stop
            bar.advance()
    # Only processes with samples there have seen it.
    again |= {block.name for block in blocks if not plan.processes.all_agree(block.name not in revisited)}
