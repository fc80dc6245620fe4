"""Prune a model in one shot. This file alone defines the order of the steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from wanda_lightning.calibration.error_notes import note_on_error
from wanda_lightning.calibration.gradients import check_predictions, gradient_statistics
from wanda_lightning.calibration.observer import Observation, Observer, PassiveCalibration
from wanda_lightning.calibration.pruning_mode import pruning_mode
from wanda_lightning.calibration.samples import Samples
from wanda_lightning.common.progress import ProgressBar
from wanda_lightning.config import PruningChoices, PruningConfig, Unpack, check_choices
from wanda_lightning.core.statistics import GradientStatistics, InputStatistics
from wanda_lightning.engine.batch_norm import BatchNormStatistics, batch_norm_layers
from wanda_lightning.engine.make_report import make_report
from wanda_lightning.engine.write import prune_stop
from wanda_lightning.experts.dropping import drop_experts
from wanda_lightning.planning.plan import Plan, make_plan, refuse_unprunable
from wanda_lightning.planning.run import Observed, Run, WeightStore
from wanda_lightning.report import Permuted, PruningReport
from wanda_lightning.training import DenseModel, ModelRecovery
from wanda_lightning.training.predictions import predictions_of
from wanda_lightning.units.costs import unit_costs
from wanda_lightning.units.finding import couple, permute

log = logging.getLogger(__name__)

_ONE_LOOP = "the batches of a validation loop run only once"


def prune(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    sparsity: float = 0.5,
    *,
    forward: Callable[[Any], object] | None = None,
    progress: bool = True,
    **choices: Unpack[PruningChoices],
) -> PruningReport:
    """Prune any model in place: the weights with the smallest scores become zero.

    `forward(batch)` runs one batch through the model. The default is `model(**batch)` for a mapping, without the keys
    that the model's forward does not take, `model(batch[0])` for a tuple or list, and `model(batch)` for a tensor. The
    zeros of an `attention_mask` in a mapping mark padding, which does not count. `position_ids` that restart (packed
    documents) exclude no token.

    Args:
        model: The model; only its weights and the running statistics of BatchNorm layers change, in place; with the
            solvers `ADMM` and `Refit`, biases of the pruned layers, too. With a permutation, the order of hidden units
            changes; with `pattern="experts"`, experts leave the model.
        batches: Calibration batches; all of them are used. `Magnitude` needs none, except for BatchNorm layers.
        sparsity: Fraction of the pruned layers' weights that become zero, in [0, 1); of their hidden units or experts
            with such a pattern.
        forward: Runs one batch through the model.
        progress: Show a bar (plain lines if there is no terminal).
        **choices: The other arguments of `PruningConfig.from_names`: `method`, `criterion`, `pattern`, `allocation`,
            `solver`, `recovery`, `permutation`, `sequential`, `skip`, `only`, `keep_batch_norm`.

    Returns:
        The report, which lists every matrix as pruned or skipped.

    Raises:
        ValueError: If the model cannot be pruned as asked, before any weight is written; or if an activation is NaN or
            infinite.
    """
    check_choices(choices)
    config = PruningConfig.from_names(sparsity, **choices)
    return prune_as(make_plan(config, model), batches, forward=forward, progress=progress)


def prune_as(
    plan: Plan,
    batches: Iterable[Any] | None = None,
    *,
    forward: Callable[[Any], object] | None = None,
    predict: Callable[[Any], object] | None = None,
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
    config = plan.config
    model = plan.model
    processes = plan.processes
    with processes.fail_together():
        store.check(plan.layers)
        batch_norms = _batch_norms(plan)
        not_corrected = ""
        if batch_norms and batches is None:
            not_corrected = "no calibration batches were given"
            batch_norms = []
        reader = config.data_reader or ("keep_batch_norm=False" if batch_norms else None)
        samples = Samples(model, batches, forward, predict, processes, reader)
        run = Run(
            plan, samples, store, progress and processes.rank == 0, not_corrected=not_corrected
        )
        allocate_first = (
            not plan.is_one_pass or config.reads_gradients
        ) and not config.pattern.drops_experts
        recovery_reads = config.recovery.reads_batches or config.recovery.trains_blocks
        if config.data_reader and (allocate_first or recovery_reads):
            samples.read_all(run.progress)  # the batches run several times, or side by side
    run.clock["prepare"] = time.perf_counter() - started
    if config.pattern.drops_experts:
        return drop_experts(run)
    if config.permutation.reads_batches:
        with run.clock.timed("permute"):
            run = replace(run, permuted=permute(run))
    if config.pattern.prunes_units:
        with run.clock.timed("find units"), pruning_mode(model):
            run = replace(run, plan=couple(run))
            run = replace(run, plan=replace(run.plan, costs=unit_costs(run)))
    with run.clock.timed("normalize", bool(batch_norms)), pruning_mode(model):
        statistics = BatchNormStatistics(batch_norms, samples, processes)
    if allocate_first:
        with run.clock.timed("allocate", bool(config.allocation.needs or config.reads_gradients)):
            run = run.allocated(partial(_observe_dense_model, run))
    recovers = config.recovery.reads_batches and config.sparsity > 0
    with run.clock.timed("recover", recovers), pruning_mode(model):
        recovery = ModelRecovery()
        if recovers:
            # With a structured pattern, layers without hidden units (not in `run.plan`) train, too.
            dense = DenseModel(model, plan.layers, plan.blocks, samples, processes, run.progress)
            recovery = config.recovery.run_dense_model(dense)
    with run.clock.timed("prune"), pruning_mode(model), note_on_error(run.written, log.error):
        run = _prune_stops(run)
    torch.clear_autocast_cache()  # it holds casts of the dense weights
    with run.clock.timed("normalize", bool(batch_norms)), pruning_mode(model, batch_norms):
        run = replace(run, batch_norm=statistics.correct())
    with run.clock.timed("recover", recovers), pruning_mode(model):
        run = replace(run, training=recovery.train())
    return make_report(run)


def rehearse(
    plan: Plan,
    find_batches: Callable[[], Iterable[Any] | None],
    forward: Callable[[Any], object],
    predict: Callable[[Any], object],
) -> None:
    """Raise the errors of a later `prune_as` that the weights or one forward pass of the first batch show.

    `find_batches` is called if a choice reads batches, and returns None if no batch can be spared.
    """
    config = plan.config
    model = plan.model
    processes = plan.processes
    with processes.fail_together():
        refuse_unprunable(plan.layers)
        reader = config.data_reader or ("keep_batch_norm=False" if _batch_norms(plan) else None)
        batches = find_batches() if reader else None
    if batches is None:
        return
    samples = Samples(model, batches, forward, predict, processes, reader)
    with pruning_mode(model), processes.fail_together():
        if sample := next(iter(samples), None):
            if config.reads_gradients:
                check_predictions(plan.layers, samples.split(sample)[0])
            elif config.recovery.reads_batches:
                predictions_of(samples.split(sample)[0].predict())
            else:
                sample.forward()
    samples.refuse_if_empty()


def prune_collected(plan: Plan, passive: PassiveCalibration) -> PruningReport:
    """Prune with the statistics that were collected from forward passes of the dense model.

    Raises:
        ValueError: Before any weight is written, if there was no batch or an activation is NaN or infinite.
    """
    permuted = Permuted(why_not=_ONE_LOOP) if plan.config.permutation.reads_batches else None
    not_corrected = _ONE_LOOP if _batch_norms(plan) else ""
    samples = Samples(plan.model, None, None, None, plan.processes, None)
    run = Run(plan, samples, WeightStore(), permuted=permuted, not_corrected=not_corrected)
    with (
        run.clock.timed("prune"),
        torch.inference_mode(False),
        torch.no_grad(),
        note_on_error(run.written, log.error),
    ):
        with plan.processes.fail_together():
            refuse_unprunable(plan.layers)
        found, run.samples.total = passive.finish()
        run = replace(run, selections=plan.allocate(found.inputs))
        prune_stop(run, plan.whole_model, found)
    torch.clear_autocast_cache()  # it holds casts of the dense weights
    return make_report(run)


def _batch_norms(plan: Plan) -> list[nn.Module]:
    """Return the BatchNorm layers whose statistics change, if they can be."""
    return batch_norm_layers(plan.model) if not plan.config.keep_batch_norm else []


def _observe_dense_model(run: Run) -> Observed:
    """Collect the input statistics and the gradients that allocation and pattern read."""
    plan, config, model = run.plan, run.plan.config, run.plan.model
    inputs: Mapping[str, InputStatistics] = {}
    gradients: Mapping[str, GradientStatistics] = {}
    if config.allocation.needs:
        observer = Observer(config.allocation.needs, plan.processes)
        with pruning_mode(model), ProgressBar("Observing", None, run.progress) as bar:
            inputs = run.store.observe_dense(run, observer, bar).inputs
    if config.reads_gradients:
        limit = config.allocation.gradient_limit
        columns = {name: units.columns for name, units in plan.coupled.items()}
        with (
            pruning_mode(model),
            ProgressBar("Backward pass", run.samples.length, run.progress) as bar,
        ):
            gradients = gradient_statistics(
                model,
                plan.layers,
                plan.blocks,
                run.samples,
                bar.step,
                plan.processes,
                limit,
                columns,
            )
        run.samples.refuse_if_empty()
    return inputs, gradients


def _prune_stops(run: Run) -> Run:
    """Observe, prune and recover each stop in turn."""
    plan, config = run.plan, run.plan.config
    observer = Observer(plan.observed, plan.processes)
    of_dense = None if plan.observed else Observation()
    if plan.is_one_pass:
        with ProgressBar("Observing", None, run.progress) as bar:
            of_dense = found = run.store.observe_dense(run, observer, bar)
        run = run if run.selections else run.allocated(lambda: (found.inputs, {}))
    with (
        ProgressBar("Pruning", None, run.progress) as bar,
        closing(run.store.stops(run, bar)) as stops,
    ):
        for stop, waiting in stops:
            bar.show(stop.name)
            if run.store.arrive(stop, run):
                continue
            recovery = config.recovery.start(stop, plan.processes)
            calls = recovery.record(waiting)
            if of_dense is None:
                prune_stop(run, stop, observer(stop, calls))
            else:
                for call in calls:  # which only record
                    call.run(on_copies=True)
                prune_stop(run, stop, of_dense)
            for part, layers in recovery.train(bar.show):
                for name in run.done.layers.keys() & {layer.name for layer in layers}:
                    run.done.layers[name] = replace(run.done.layers[name], part=part)
        run.store.finish(run)
    return run
