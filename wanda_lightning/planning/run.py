"""One pruning run: what is pruned, with which samples, where the weights are, and what has happened so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace

from torch import Tensor

from wanda_lightning.calibration.lockstep import Call, Passed, Stops, lockstep, whole_model_calls
from wanda_lightning.calibration.observer import Observation, Observer
from wanda_lightning.calibration.samples import Samples
from wanda_lightning.common.progress import ProgressBar
from wanda_lightning.common.wording import quantity
from wanda_lightning.core.statistics import GradientStatistics, InputStatistics
from wanda_lightning.models import Layer, SkippedMatrix, SkipReason, Stop
from wanda_lightning.planning.plan import Plan, Selections, refuse_unprunable
from wanda_lightning.report import BatchNormCorrection, Permuted, PrunedLayer, Training

Observed = tuple[Mapping[str, InputStatistics], Mapping[str, GradientStatistics]]


class Clock(dict[str, float]):
    """Seconds by stage."""

    @contextmanager
    def timed(self, stage: str, is_reported: bool = True) -> Iterator[None]:
        """Add the time of this block to a stage of the report; a stage that does nothing is left out."""
        started = time.perf_counter()
        try:
            yield
        finally:
            if is_reported:
                self[stage] = self.get(stage, 0.0) + time.perf_counter() - started


@dataclass
class Done:
    """The records of the layers so far, by name. An error message uses them, too, so they are added at each write."""

    # In the order in which they were pruned.
    layers: dict[str, PrunedLayer] = field(default_factory=dict)
    skipped: dict[str, SkippedMatrix] = field(default_factory=dict)  # left dense
    # Number of tokens of each expert that was pruned with the statistics of all experts of its module.
    few_tokens: dict[str, int] = field(default_factory=dict)
    # Hidden units that are zero, by the layer that reads them.
    zero_units: dict[str, int] = field(default_factory=dict)
    # Stops that the model called after they were pruned.
    passed: Passed = field(default_factory=Passed)


@dataclass(frozen=True)
class Run:
    """One pruning run; each stage returns what it found, and the next one gets it in a new value."""

    plan: Plan
    samples: Samples
    store: WeightStore
    progress: bool = False  # whether to show bars
    clock: Clock = field(default_factory=Clock)
    done: Done = field(default_factory=Done)
    selections: Selections = field(default_factory=dict)  # empty until the sparsities are allocated
    permuted: Permuted | None = None
    not_corrected: str = (
        ""  # why BatchNorm layers were not corrected; empty if they were, or there are none
    )
    batch_norm: BatchNormCorrection | None = None
    training: Training | None = None  # of the whole model

    def allocated(self, observe: Callable[[], Observed]) -> Run:
        """Return this run with a sparsity for each layer, from what `observe` finds, or as an earlier run chose it."""
        with self.plan.processes.fail_together():
            selections = self.store.recall(self.plan)
        if selections:
            self.samples.count()
            return replace(self, selections=selections)
        found = observe()
        allocation = self.plan.config.allocation
        is_shown = (
            self.progress
            and bool(allocation.needs or allocation.reads_gradients)
            and not self.plan.coupled
        )
        with self.store.dense(), ProgressBar("Allocating", None, is_shown) as bar:

            def read(layer: Layer) -> Tensor:
                bar.show(layer.name)
                bar.advance()
                self.store.load(layer.name)
                return layer.read()

            selections = self.plan.allocate(*found, read)
        self.store.keep(selections)
        return replace(self, selections=selections)

    def written(self) -> str:
        """Say, for an error, how many layers are pruned already; return nothing if none is."""
        pruned = quantity(len(self.done.layers), "layer is", "layers are")
        return (
            f"{pruned} already pruned; the others are dense. {self.store.advice}"
            if self.done.layers
            else ""
        )


def unreached(layer: Layer) -> SkippedMatrix:
    """Return the record of a layer that no calibration batch called."""
    return SkippedMatrix(
        layer.name, layer.stored_shape, SkipReason.UNREACHED, "no calibration batch called it"
    )


class WeightStore:
    """All weights and activations stay in memory."""

    zeros: int = 0  # among the weights that are not in memory
    advice: str = "Reload the model before you try again."  # if pruning fails halfway

    def check(self, layers: Sequence[Layer]) -> None:
        """Refuse weights that are in memory and cannot be pruned."""
        refuse_unprunable(layers)

    def observe_dense(self, run: Run, observer: Observer, bar: ProgressBar) -> Observation:
        """Observe all layers in one pass of all samples through the dense model."""
        bar.expect(run.samples.length)
        return observer.whole_model(run.plan.whole_model, run.samples, bar.advance)

    def stops(self, run: Run, bar: ProgressBar) -> Stops:
        """Yield each stop before it is pruned, with the calls that wait there, which then run through what is pruned.

        No sample waits there if nothing is left to observe or to record.
        """
        plan = run.plan
        bar.expect(len(plan.stops))
        stops: Iterable[tuple[Stop, list[Call]]] = ((stop, []) for stop in plan.stops)
        if plan.observed and (plan.config.recovery.trains_blocks or not plan.is_one_pass):
            samples = run.samples.in_memory()
            stops = lockstep(plan.stops, samples, plan.processes, run.done.passed, model=plan.model)
        for stop in stops:
            yield stop
            bar.advance()

    def passed(self, run: Run, watched: Callable[[Call], Call], bar: ProgressBar) -> Iterator[Stop]:
        """Yield each stop when all samples have passed it, by calls that are `watched`; then its experts may leave.

        With `sequential="none"`, the whole model is the stop.
        """
        if run.plan.config.sequential == "none":
            bar.expect(run.samples.length)
            with run.plan.processes.fail_together():
                for call in whole_model_calls(run.samples, bar.advance):
                    watched(call).run()
            run.samples.refuse_if_empty()
            yield run.plan.whole_model
            return
        with closing(self.stops(run, bar)) as stops:
            for stop, calls in stops:
                bar.show(stop.name)
                if not self.arrive(stop, run):
                    with run.plan.processes.fail_together():
                        for call in calls:
                            watched(call).run(on_copies=True)
                    yield stop

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Give access to the weights before pruning, in one pass through the model in this block."""
        yield

    def load(self, name: str) -> None:
        """Load the dense weights of a layer or a stop."""

    def repeat(self, block: str, change: Callable[[], None]) -> None:
        """Apply `change`, which the dense weights of a block have seen, again each time they are read."""

    def undo(self, change: Callable[[], None]) -> None:
        """Call `change`, which takes back a change of the dense weights of a block after their pass."""
        change()

    def recall(self, plan: Plan) -> Selections:
        """Return the selections that an earlier run has made; empty if there are none."""
        return {}

    def keep(self, selections: Selections) -> None:
        """Keep the selections for a later run that continues this one."""

    def arrive(self, stop: Stop, run: Run) -> bool:
        """Prepare a stop that is about to be pruned; return whether an earlier run has pruned it already."""
        return False

    def finish(self, run: Run) -> None:
        """Store what is left, after the last stop."""


def dense_blocks(
    run: Run, blocks: Sequence[Stop], count: int, title: str, again: set[str]
) -> Stops:
    """Stop at each block, whose weights are in memory then.

    The samples are the first `count` of all processes together. After the last block, `again` receives the names of
    those that a sample of any process has reached after its stop: such a call may use a block in another way.
    """
    store = run.store
    plan = run.plan
    passed = Passed()
    samples = run.samples.first_samples(count)
    if not any(number for (number,) in plan.processes.all_gather([len(samples)])):
        run.samples.refuse_if_empty()
    with ProgressBar(title, len(blocks), run.progress) as bar, store.dense():
        for stop, calls in lockstep(blocks, samples, plan.processes, passed, model=plan.model):
            bar.show(stop.name)
            store.load(stop.name)
            yield stop, calls
            bar.advance()
    # Only processes with samples there have seen it.
    missed = passed.again | passed.late
    again |= {
        block.name for block in blocks if not plan.processes.all_agree(block.name not in missed)
    }
