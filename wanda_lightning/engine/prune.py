"""Prune a model in one shot. This file alone defines the order of the steps."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from wanda_lightning.calibration.batches import BatchFunction
from wanda_lightning.calibration.error_notes import note_on_error
from wanda_lightning.calibration.gradients import check_predictions, gradient_statistics
from wanda_lightning.calibration.lockstep_check import explain, may_keep_state, rehearse_samples
from wanda_lightning.calibration.observer import (
    Observation,
    Observer,
    PassiveCalibration,
    StopObserver,
)
from wanda_lightning.calibration.pruning_mode import pruning_mode
from wanda_lightning.calibration.samples import Samples
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.progress import ProgressBar
from wanda_lightning.config import PruningChoices, PruningConfig, Unpack, check_choices
from wanda_lightning.core.patterns import Pattern
from wanda_lightning.core.statistics import GradientStatistics, Inputs
from wanda_lightning.engine.batch_norm import BatchNormStatistics, batch_norm_layers
from wanda_lightning.engine.make_report import make_report
from wanda_lightning.experts.remove_experts import RemoveExperts
from wanda_lightning.masks.remove_weights import RemoveWeights
from wanda_lightning.models import Layer
from wanda_lightning.planning.plan import DenseStatistics, Plan, make_plan, refuse_unprunable
from wanda_lightning.planning.removal import Removal
from wanda_lightning.planning.run import Run, WeightStore
from wanda_lightning.report import PruningReport
from wanda_lightning.training import DenseModel, ModelRecovery
from wanda_lightning.training.predictions import predictions_of
from wanda_lightning.training.recovery import BlockRecovery
from wanda_lightning.units.remove_units import RemoveUnits

log = logging.getLogger(__name__)

_REMOVALS: Mapping[str, type[Removal]] = {
    "weights": RemoveWeights,
    "units": RemoveUnits,
    "experts": RemoveExperts,
}

_ONE_LOOP = "the batches of a validation loop run only once"


def prune(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    sparsity: float = 0.5,
    *,
    forward: BatchFunction | None = None,
    progress: bool = True,
    **choices: Unpack[PruningChoices],
) -> PruningReport:
    """Prune any model in place: the weights with the smallest scores become zero.

    `forward(batch)` runs one batch through the model. The default is `model(**batch)` for a mapping, without the keys
    that the model's forward does not take, `model(batch[0])` for a tuple or list, and `model(batch)` for a tensor. The
    zeros of an `attention_mask` in a mapping mark padding, which does not count. `position_ids` that restart (packed
    documents) exclude no token. A model that tokenizes texts, such as a `SentenceTransformer`, gets the mapping itself.

    Args:
        model: The model; only its weights and the running statistics of BatchNorm layers change, in place; with the
            solvers `ADMM` and `Refit`, biases of the pruned layers, too. With `pattern="experts"`, experts leave the
            model.
        batches: Calibration batches, or a list of texts for a model that tokenizes them; all of them are used.
            `Magnitude` needs none, except for BatchNorm layers.
        sparsity: Fraction of the pruned layers' weights that become zero, in [0, 1); of their hidden units or experts
            with such a pattern.
        forward: Runs one batch through the model.
        progress: Show a bar (plain lines if there is no terminal).
        **choices: The other arguments of `PruningConfig.from_names`: `method`, `criterion`, `pattern`, `allocation`,
            `solver`, `recovery`, `sequential`, `skip`, `only`, `keep_batch_norm`.

    Returns:
        The report, which lists every matrix as pruned or skipped.

    Raises:
        ValueError: If the model cannot be pruned as asked, before any weight is written; or if an activation is NaN or
            infinite.
    """
    check_choices(choices, prune)
    config = PruningConfig.from_names(sparsity, **choices)
    return prune_as(make_plan(config, model), batches, forward=forward, progress=progress)


def removal_of(pattern: Pattern) -> Removal:
    """Return what carries out a pattern: the removal of weights, hidden units or experts, for one run."""
    return _REMOVALS[pattern.removes]()


def prune_as(
    plan: Plan,
    batches: Iterable[Any] | None = None,
    *,
    forward: BatchFunction | None = None,
    predict: BatchFunction | None = None,
    progress: bool = True,
    store: WeightStore = WeightStore(),
) -> PruningReport:
    """Prune as planned, in one process or several.

    Args:
        plan: The choices, the model and the processes. All of these processes call this, with the same choices and a
            full copy of the model. Statistics are summed over all of them, so they choose the same masks; an error in
            one process ends all of them.
        batches: Calibration batches of this process.
        forward: Runs one batch through the model.
        predict: Runs one batch and returns the logits, for choices that read gradients or train on predictions; by
            default `forward`.
        progress: Show a bar in the first process.
        store: Where the weights are.
    """
    started = time.perf_counter()
    # What is refused is refused here, before the model runs.
    with plan.processes.fail_together():
        store.check(plan.layers)
        batch_norms = _batch_norms(plan)
        not_corrected = ""
        if batch_norms and batches is None:
            batch_norms = []
            not_corrected = "no calibration batches were given"
        samples = Samples(
            plan.model, batches, forward, predict, plan.processes, _data_reader(plan, batch_norms)
        )
        removal = removal_of(plan.config.pattern)
        shows_bars = progress and plan.processes.rank == 0
        run = Run(plan, samples, store, shows_bars, not_corrected=not_corrected)
        _read_all_if_needed(run)
    run = _rehearsed(run)
    plan = run.plan
    run.clock["prepare"] = time.perf_counter() - started

    run = removal.find(run)  # hidden units, experts; from now on, the plan concerns what can leave
    statistics = BatchNormStatistics(batch_norms, samples)
    with run.clock.timed("normalize", batch_norms), pruning_mode(plan.model):
        statistics.observe_dense()
    run = _allocate(run, removal)  # the sparsity of each layer
    recovery = _start_recovery(run, plan.layers)
    run = _prune_stops(run, removal)
    with run.clock.timed("normalize", batch_norms), pruning_mode(plan.model, batch_norms):
        run = replace(run, batch_norm=statistics.correct())
    with run.clock.timed("recover", recovery), pruning_mode(plan.model):
        if recovery:
            run = replace(run, training=recovery.train())
    return make_report(run, removal)


def rehearse(
    plan: Plan,
    find_batches: Callable[[], Iterable[Any] | None],
    forward: BatchFunction,
    predict: BatchFunction,
) -> None:
    """Raise the errors of a later `prune_as` that the weights or one forward pass of the first batch show.

    `find_batches` is called if a choice reads batches, and returns None if no batch can be spared.
    """
    config = plan.config
    with plan.processes.fail_together():
        refuse_unprunable(plan.layers)
        reader = _data_reader(plan, _batch_norms(plan))
        batches = find_batches() if reader else None
    if batches is None:
        return

    samples = Samples(plan.model, batches, forward, predict, plan.processes, reader)
    with pruning_mode(plan.model), plan.processes.fail_together():
        for sample in samples:
            if config.reads_gradients:
                check_predictions(plan.layers, samples.split(sample)[0])
            elif config.recovery.reads_batches:
                predictions_of(samples.split(sample)[0].predict())
            else:
                sample.forward()
            break
    samples.refuse_if_empty()


def prune_collected(plan: Plan, passive: PassiveCalibration) -> PruningReport:
    """Prune with the statistics that were collected from forward passes of the dense model.

    Raises:
        ValueError: Before any weight is written, if there was no batch or an activation is NaN or infinite.
    """
    # The report says what could not be done, instead of a refusal: the loop has ended.
    not_corrected = _ONE_LOOP if _batch_norms(plan) else ""
    samples = Samples(plan.model, None, None, None, plan.processes, None)
    removal = removal_of(plan.config.pattern)
    run = Run(plan, samples, WeightStore(), not_corrected=not_corrected)
    with (
        run.clock.timed("prune"),
        torch.inference_mode(False),
        torch.no_grad(),
        note_on_error(run.describe_progress, log.error),
    ):
        with plan.processes.fail_together():
            refuse_unprunable(plan.layers)
        observation, samples.total = passive.finish()
        run = _with_sparsities(run, removal, DenseStatistics(observation.inputs))
        removal.prune(run, plan.whole_model, observation)
    torch.clear_autocast_cache()  # it holds casts of the dense weights
    return make_report(run, removal)


def _batch_norms(plan: Plan) -> list[nn.Module]:
    """Return the BatchNorm layers whose statistics should change."""
    return [] if plan.config.keep_batch_norm else batch_norm_layers(plan.model)


def _data_reader(plan: Plan, batch_norms: list[nn.Module]) -> str | None:
    """Return the first choice that reads calibration data, for messages; None if no choice does."""
    if plan.config.data_reader is None and batch_norms:
        return "keep_batch_norm=False"
    return plan.config.data_reader


def _read_all_if_needed(run: Run) -> None:
    """Load all batches into memory if they run several times, or side by side."""
    config = run.plan.config
    allocates_first = not run.plan.is_one_pass or config.reads_gradients
    recovers = config.recovery.reads_batches or config.recovery.trains_blocks
    if config.data_reader and (allocates_first or recovers):
        run.samples.read_all(run.progress)


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


def _allocate(run: Run, removal: Removal) -> Run:
    """Return the run with a sparsity for each layer."""
    config = run.plan.config
    if run.plan.is_one_pass and not config.reads_gradients:
        # The one pass that observes all layers comes first; the sparsities are chosen after it.
        return run
    is_reported = config.allocation.needs or config.reads_gradients
    with run.clock.timed("allocate", is_reported=is_reported):
        resumed = _resumed(run, removal)
        if resumed is not None:
            return resumed
        dense = _observe_dense_model(run, removal.unit_columns)
        return _with_sparsities(run, removal, dense)


def _resumed(run: Run, removal: Removal) -> Run | None:
    """Return the run with the sparsities that an interrupted run has chosen; None if there are none."""
    with run.plan.processes.fail_together():
        sparsities = run.store.stored_sparsities()
    if not sparsities:
        return None
    run.samples.count()
    return replace(run, selections=removal.selections(run.plan, sparsities))


def _observe_dense_model(run: Run, unit_columns: Mapping[str, int]) -> DenseStatistics:
    """Collect the input statistics and the gradients that allocation and pattern read."""
    plan = run.plan
    config = plan.config
    inputs: Inputs = {}
    gradients: Mapping[str, GradientStatistics] = {}
    if config.allocation.needs:
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


def _with_sparsities(run: Run, removal: Removal, dense: DenseStatistics) -> Run:
    """Return the run with a sparsity for each layer, the same in all processes."""
    plan = run.plan
    allocation = plan.config.allocation
    reads_weights = bool(allocation.needs or allocation.reads_gradients)
    shows_bar = run.progress and reads_weights and not removal.unit_columns
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
            sparsities = removal.choose_sparsities(plan, dense, read)
        # One process decides: numbers that differ in the last digit could give different masks.
        sparsities = plan.processes.broadcast(sparsities, 0)

    selections = removal.selections(plan, sparsities, dense)
    run.store.store_sparsities({name: chosen.sparsity for name, chosen in selections.items()})
    return replace(run, selections=selections)


def _start_recovery(run: Run, layers: tuple[Layer, ...]) -> ModelRecovery | None:
    """Start the recovery of the whole model; None if it is not to be trained.

    With a structured pattern, the `layers` without hidden units, which are not in the plan of the run, train, too.
    """
    plan = run.plan
    if not (plan.config.recovery.reads_batches and plan.config.sparsity > 0):
        return None
    dense = DenseModel(plan.model, layers, plan.blocks, run.samples, plan.processes, run.progress)
    with run.clock.timed("recover"), pruning_mode(plan.model):
        return plan.config.recovery.run_dense_model(dense)


def _prune_stops(run: Run, removal: Removal) -> Run:
    """Observe, prune and recover each stop in turn."""
    with (
        run.clock.timed("prune"),
        pruning_mode(run.plan.model) as buffers,
        note_on_error(run.describe_progress, log.error),
    ):
        run = replace(run, buffers=buffers)
        observer = removal.observer(run.plan)
        run, dense_observation = _observe_in_one_pass(run, removal, observer)
        restore = partial(removal.restore, run)
        with (
            ProgressBar("Pruning", None, run.progress) as bar,
            closing(run.store.visits(run, bar, restore)) as visits,
        ):
            for visit in visits:
                bar.show(visit.stop.name)
                recovery = run.plan.config.recovery.start(visit.stop, run.plan.processes)
                calls = recovery.record(visit.calls)
                if dense_observation is None:
                    # The calls run here, with what was pruned before this stop.
                    observation = observer(visit.stop, calls)
                else:
                    observation = dense_observation
                    for call in calls:  # which only record
                        call.run(on_copies=True)
                removal.prune(run, visit.stop, observation)
                _train_block(run, recovery, bar)
            removal.refuse_unreached(run)
            run.store.finish(run)
    torch.clear_autocast_cache()  # it holds casts of the dense weights
    removal.finish(run)
    return run


def _observe_in_one_pass(
    run: Run, removal: Removal, observer: StopObserver
) -> tuple[Run, Observation | None]:
    """Return what all stops are pruned with; None if each stop is observed when it is reached.

    The sparsities of the layers follow from it, if they are not known yet.
    """
    if not run.plan.observed:
        return run, Observation()
    if not run.plan.is_one_pass:
        return run, None
    with ProgressBar("Observing", None, run.progress) as bar:
        observation = run.store.observe_dense(run, observer, bar)
    if not run.selections:
        dense = DenseStatistics(observation.inputs)
        run = _resumed(run, removal) or _with_sparsities(run, removal, dense)
    return run, observation


def _train_block(run: Run, recovery: BlockRecovery, bar: ProgressBar) -> None:
    """Train the parts of a block, and record each part with its layers."""
    for part, layers in recovery.train(bar.show):
        for layer in layers:
            if layer.name in run.done.layers:
                run.done.layers[layer.name] = replace(run.done.layers[layer.name], part=part)
