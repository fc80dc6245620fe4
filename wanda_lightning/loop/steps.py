"""The steps that zeros, hidden units and experts share: begin, choose sparsities, visit each stop, train.

Each of the three is a function that calls these steps in its own order (`verbs/prune_weights.py`,
`verbs/remove_units.py`, `experts/remove_experts.py`); the steps know neither masks nor widths.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from wanda_lightning.calibration.batches import BatchFunction
from wanda_lightning.calibration.error_notes import note_on_error
from wanda_lightning.calibration.gradients import gradient_statistics
from wanda_lightning.calibration.lockstep_check import explain, may_keep_state, rehearse_samples
from wanda_lightning.calibration.observer import Observation, Observer, StopObserver
from wanda_lightning.calibration.pruning_mode import pruning_mode
from wanda_lightning.calibration.samples import Samples
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.progress import ProgressBar
from wanda_lightning.core.allocation import Sparsities
from wanda_lightning.core.patterns import Pattern
from wanda_lightning.core.selection import Selection
from wanda_lightning.core.statistics import GradientStatistics, Inputs
from wanda_lightning.loop.batch_norm import BatchNormStatistics, batch_norm_layers
from wanda_lightning.loop.plan import DenseStatistics, Plan, make_plan
from wanda_lightning.loop.run import Restore, Run, WeightStore
from wanda_lightning.models import Layer, ReadWeight, Stop
from wanda_lightning.training import DenseModel, ModelRecovery
from wanda_lightning.training.recovery import BlockRecovery

log = logging.getLogger(__name__)

ChooseSparsities = Callable[[Plan, DenseStatistics, ReadWeight], Sparsities]
"""Returns a sparsity for each layer, in one process for all; the last argument reads a weight of the dense model."""

PatternFor = Callable[[Plan, Layer, float], Pattern]
"""Returns the pattern of a layer with a sparsity of its own."""


def begin(
    plan: Plan,
    batches: Iterable[Any] | None,
    forward: BatchFunction | None = None,
    predict: BatchFunction | None = None,
    progress: bool = True,
    store: WeightStore = WeightStore(),
) -> Run:
    """Start a run: refuse what can be refused before the model runs, then try a sample unless many run first.

    Args:
        plan: The layers, their stops, and the choices.
        batches: Calibration batches of this process.
        forward: Runs one batch through the model; by default as in `prune`.
        predict: Runs one batch and returns the logits, for choices that read gradients or train on predictions.
        progress: Show bars in the first process.
        store: Where the weights are.

    Raises:
        ValueError: If the model cannot be changed, or the batches cannot be read.
    """
    started = time.perf_counter()
    with plan.processes.fail_together():
        store.check(plan.layers)
        not_corrected = ""
        if norms_to_correct(plan) and batches is None:
            not_corrected = "no calibration batches were given"
        reader = data_reader(plan, corrects_norms=not not_corrected)
        samples = Samples(plan.model, batches, forward, predict, plan.processes, reader)
        shows_bars = progress and plan.processes.rank == 0
        run = Run(plan, samples, store, shows_bars, not_corrected=not_corrected)
        _read_all_if_needed(run)
    run = _rehearsed(run)
    run.clock["prepare"] = time.perf_counter() - started
    return run


def norms_to_correct(plan: Plan) -> list[nn.Module]:
    """Return the BatchNorm layers whose statistics should change."""
    return [] if plan.config.keep_batch_norm else batch_norm_layers(plan.model)


def data_reader(plan: Plan, corrects_norms: bool = True) -> str | None:
    """Return the first choice that reads calibration data, for messages; None if no choice does."""
    if plan.config.data_reader is None and corrects_norms and norms_to_correct(plan):
        return "keep_batch_norm=False"
    return plan.config.data_reader


def _read_all_if_needed(run: Run) -> None:
    """Load all batches into memory if they run several times, or side by side."""
    config = run.plan.config
    allocates_first = not run.plan.is_one_pass or config.reads_gradients
    recovers = config.recovery.reads_batches or config.recovery.trains_blocks
    if config.data_reader and (allocates_first or recovers):
        run.samples.read_all()


def _rehearsed(run: Run) -> Run:
    """Raise the errors of a sample before any weight changes, and plan for one pass where a lockstep would differ."""
    plan = run.plan
    waits = plan.config.sequential != "none" or plan.config.recovery.trains_blocks
    keeps_state = waits and may_keep_state(plan.model)
    if not plan.observed or not run.samples.can_try or (plan.runs_dense and not keeps_state):
        return run

    batches = run.samples.in_memory()[:2]  # a process may have none
    with pruning_mode(plan.model), plan.processes.fail_together():
        index = rehearse_samples(plan.model, plan.stops, run.samples, batches, keeps_state)
    index = plan.processes.all_reduce_min(index)
    if index == len(plan.stops):
        return run

    why = explain(plan.stops[index])
    if plan.config.recovery.trains_blocks:
        raise UserError(
            f"recovery={plan.config.recovery} runs blocks on the inputs of waiting batches, but {why}. Choose another "
            "recovery, such as 'distill'."
        )
    one_pass = make_plan(replace(plan.config, sequential="none"), plan.model, plan.processes)
    fallback = f"sequential='none' replaced {plan.config.sequential!r}: {why}"
    return replace(run, plan=one_pass, fallback=fallback)


# The dense model, and the sparsity of each layer


def observe_batch_norm(run: Run) -> BatchNormStatistics:
    """Run samples through the dense model, for BatchNorm layers that are corrected after pruning."""
    norms = [] if run.not_corrected else norms_to_correct(run.plan)
    statistics = BatchNormStatistics(norms, run.samples)
    if norms:
        with run.clock.timed("normalize"), pruning_mode(run.plan.model):
            statistics.observe_dense()
    return statistics


def correct_batch_norm(run: Run, statistics: BatchNormStatistics) -> Run:
    """Correct the BatchNorm layers of the pruned model, and free what it was pruned with."""
    run = replace(run, observation=None)
    if not statistics.layers:
        return run
    with run.clock.timed("normalize"), pruning_mode(run.plan.model):
        return replace(run, batch_norm=statistics.correct())


def allocate(
    run: Run,
    choose: ChooseSparsities,
    pattern_for: PatternFor,
    unit_columns: Mapping[str, int] = {},
) -> Run:
    """Return the run with the statistics of the dense model that it needs, and with a sparsity for each layer.

    `unit_columns` holds the columns of a hidden unit, by the layer that reads it, if gradients are summed over units.
    """
    config = run.plan.config
    observer = Observer(run.plan.observed, run.plan.processes)
    if not config.reads_gradients:
        # The sparsities follow from the pass that observes all layers, if there is one.
        run = observe_in_one_pass(run, observer)
    observes_first = config.allocation.needs or config.reads_gradients
    with run.clock.timed("allocate" if observes_first else "prune"):
        resumed = _resumed(run, pattern_for)
        if resumed is not None:
            run = resumed
        else:
            dense = _observe_dense_model(run, unit_columns)
            run = with_sparsities(run, dense, choose, pattern_for)
    return observe_in_one_pass(run, observer)


def observe_in_one_pass(run: Run, observer: StopObserver) -> Run:
    """Return the run with what all stops are pruned with, unless each stop is observed when it is reached."""
    if not run.plan.is_one_pass or run.observation:
        return run
    with (
        run.clock.timed("prune"),
        pruning_mode(run.plan.model),
        ProgressBar("Observing", None, run.progress) as bar,
    ):
        return replace(run, observation=run.store.observe_dense(run, observer, bar))


def _resumed(run: Run, pattern_for: PatternFor) -> Run | None:
    """Return the run with the sparsities that an interrupted run has chosen; None if there are none."""
    with run.plan.processes.fail_together():
        sparsities = run.store.stored_sparsities()
    if not sparsities:
        return None
    run.samples.count()
    return replace(run, selections=_selections(run.plan, sparsities, pattern_for))


def _observe_dense_model(run: Run, unit_columns: Mapping[str, int]) -> DenseStatistics:
    """Collect the input statistics and the gradients that allocation and pattern read."""
    plan = run.plan
    config = plan.config
    inputs: Inputs = {}
    gradients: Mapping[str, GradientStatistics] = {}
    if run.observation:
        inputs = run.observation.inputs
    elif config.allocation.needs:
        observer = Observer(config.allocation.needs, plan.processes)
        with pruning_mode(plan.model), ProgressBar("Observing", None, run.progress) as bar:
            inputs = run.store.observe_dense(run, observer, bar).inputs
    if config.reads_gradients:
        with (
            pruning_mode(plan.model),
            ProgressBar("Backward pass", run.samples.length, run.progress) as bar,
        ):
            gradients = gradient_statistics(
                plan.model,
                plan.layers,
                plan.blocks,
                run.samples,
                bar.step,
                config.allocation.gradient_limit,
                unit_columns,
            )
        run.samples.refuse_if_empty()
    return DenseStatistics(inputs, gradients)


def with_sparsities(
    run: Run,
    dense: DenseStatistics,
    choose: ChooseSparsities,
    pattern_for: PatternFor,
) -> Run:
    """Return the run with a sparsity for each layer, the same in all processes."""
    plan = run.plan
    allocation = plan.config.allocation
    reads_weights = bool(allocation.needs or allocation.reads_gradients)
    shows_bar = run.progress and reads_weights
    with (
        run.store.dense_reader() as read_dense,
        ProgressBar("Allocating", None, shows_bar) as bar,
        plan.processes.fail_together(),
    ):

        def read(layer: Layer) -> Tensor:
            bar.show(layer.name)
            bar.advance()
            return read_dense(layer)

        sparsities = {}
        if plan.processes.rank == 0:
            sparsities = choose(plan, dense, read)
        # One process decides: numbers that differ in the last digit could give different masks.
        sparsities = plan.processes.broadcast(sparsities, 0)

    selections = _selections(plan, sparsities, pattern_for, dense)
    run.store.store_sparsities({name: chosen.sparsity for name, chosen in selections.items()})
    return replace(run, selections=selections)


def _selections(
    plan: Plan,
    sparsities: Sparsities,
    pattern_for: PatternFor,
    dense: DenseStatistics = DenseStatistics(),
) -> dict[str, Selection]:
    """Return how the weights of each layer are selected; a layer without a sparsity of its own gets the target."""
    selections = {}
    for layer in plan.layers:
        sparsity = sparsities.get(layer.name, plan.config.sparsity)
        pattern = pattern_for(plan, layer, sparsity)
        selection = Selection(plan.config.criterion, pattern, sparsity)
        if pattern.weigh_rows and layer.name in dense.gradients:
            selection = replace(selection, row_weights=dense.gradients[layer.name].row_weights())
        selections[layer.name] = selection
    return selections


# The stops


@contextmanager
def pruning(run: Run) -> Iterator[Run]:
    """Let weights change in this block: in evaluation mode, and an error says how far the run came."""
    with (
        run.clock.timed("prune"),
        pruning_mode(run.plan.model),
        note_on_error(run.describe_progress, log.error),
    ):
        yield run
    torch.clear_autocast_cache()  # it holds casts of the dense weights


def visit_stops(
    run: Run,
    observer: StopObserver,
    prune: Callable[[Run, Stop, Observation], None],
    restore: Restore = lambda layers: None,
) -> None:
    """Observe each stop, call `prune` with what was observed, and train what is left of it.

    The samples then run through the stop as `prune` has left it, unless the plan has `sequential="none"`.
    `restore` gives layers the shapes that they have after pruning, if an interrupted run has written them.
    """
    plan = run.plan
    run = observe_in_one_pass(run, observer)
    observation = run.observation if plan.observed else Observation()
    with (
        ProgressBar("Pruning", None, run.progress) as bar,
        closing(run.store.visits(run, bar, restore)) as visits,
    ):
        for visit in visits:
            bar.show(visit.stop.name)
            recovery = plan.config.recovery.start(visit.stop, plan.processes)
            calls = recovery.record(visit.calls)
            if observation is None:
                # The calls run here, with what was pruned before this stop.
                prune(run, visit.stop, observer(visit.stop, calls))
            else:
                for call in calls:  # which only record
                    call.run(on_copies=True)
                prune(run, visit.stop, observation)
            _train_block(run, recovery, bar)


def _train_block(run: Run, recovery: BlockRecovery, bar: ProgressBar) -> None:
    """Train the parts of a block, and record each part with its layers."""
    for part, layers in recovery.train(bar.show):
        for layer in layers:
            if layer.name in run.done.layers:
                run.done.layers[layer.name] = replace(run.done.layers[layer.name], part=part)


# Training of the whole model


def start_recovery(run: Run, layers: tuple[Layer, ...]) -> ModelRecovery | None:
    """Start the recovery of the whole model, of which `layers` train; None if it is not to be trained."""
    plan = run.plan
    if not (plan.config.recovery.reads_batches and plan.config.sparsity > 0):
        return None
    dense = DenseModel(plan.model, layers, plan.blocks, run.samples, plan.processes, run.progress)
    with run.clock.timed("recover"), pruning_mode(plan.model):
        return plan.config.recovery.run_dense_model(dense)


def recover(run: Run, recovery: ModelRecovery | None) -> Run:
    """Train the whole model, if it is to be trained."""
    if recovery is None:
        return run
    with run.clock.timed("recover"), pruning_mode(run.plan.model):
        return replace(run, training=recovery.train())
