"""Prune a model in one shot. This file alone defines the order of the steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import UninitializedParameter

from wanda_lightning.calibration.batches import CalibrationBatches
from wanda_lightning.calibration.calibrate import UnitStop, calibrate, watch_units
from wanda_lightning.calibration.error_notes import noting
from wanda_lightning.calibration.gradients import gradient_statistics, gradient_statistics_by_block
from wanda_lightning.calibration.mode import pruning_mode
from wanda_lightning.calibration.observer import Observer, PassiveCalibration
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.progress import ProgressBar
from wanda_lightning.config import PruningChoices, PruningConfig, Unpack
from wanda_lightning.core.gram import relative_error
from wanda_lightning.core.statistics import GradientStatistics, InputStatistics
from wanda_lightning.core.types import Weight
from wanda_lightning.engine.batch_norm import BatchNormStatistics, batch_norm_layers
from wanda_lightning.engine.notes import Outcome, notes_on
from wanda_lightning.engine.permuting import permute
from wanda_lightning.engine.plan import Plan, Selections, make_plan
from wanda_lightning.engine.store import WeightStore
from wanda_lightning.models import Layer, SkippedMatrix, SkipReason, Unit, is_unloaded, is_wrapper
from wanda_lightning.parallel import SINGLE_PROCESS, Processes, is_sharded, reshard, zero_counts
from wanda_lightning.report import POOLED, Permuted, PrunedLayer, PruningReport, TrainedPart
from wanda_lightning.training import DenseModel, ModelRecovery

log = logging.getLogger(__name__)

Observed = tuple[Mapping[str, InputStatistics], Mapping[str, GradientStatistics]]


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
    zeros of an `attention_mask` in a mapping mark padding, which does not count. Nothing else marks padding:
    `position_ids` that restart (packed documents) exclude no token.

    Args:
        model: The model; only its weights and the running statistics of BatchNorm layers change, in place. With a
            permutation, the order of hidden units changes, too.
        batches: Calibration batches; all of them are used. `Magnitude` needs none, except for BatchNorm layers.
        sparsity: Fraction of the pruned layers' weights that become zero, in [0, 1).
        forward: Runs one batch through the model.
        progress: Show a bar (plain lines if there is no terminal).
        **choices: The other arguments of `PruningConfig.from_names`: `method`, `criterion`, `pattern`, `allocation`,
            `solver`, `recovery`, `permutation`, `sequential`, `skip`, `only`, `include_grouped`, `min_expert_tokens`,
            `keep_batch_norm`.

    Returns:
        The report, which lists every matrix as pruned or skipped.

    Raises:
        ValueError: If the model cannot be pruned as asked, before any weight is written; or if an activation is NaN or
            infinite.
    """
    config = PruningConfig.from_names(sparsity, **choices)
    return prune_as(config, model, batches, forward=forward, progress=progress)


def prune_as(
    config: PruningConfig,
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    *,
    forward: Callable[[Any], object] | None = None,
    predict: Callable[[Any], object] | None = None,
    progress: bool = True,
    processes: Processes = SINGLE_PROCESS,
    store: WeightStore = WeightStore(),
) -> PruningReport:
    """Prune with resolved choices, in one process or several.

    Args:
        config: The choices.
        model: A full copy in each process, or sharded on dimension 0 by FSDP2 (`fully_shard`).
        batches: Calibration batches of this process.
        forward: Runs one batch through the model.
        predict: Runs one batch and returns the logits, for choices that read gradients or train on predictions; by
            default `forward`.
        progress: Show a bar in the first process.
        processes: All processes that call this, with the same choices. Statistics are summed over all of them, so they
            choose the same masks; an error in one process ends all of them.
        store: Where the weights are, and the activations of batches that wait.
    """
    seconds: dict[str, float] = {}
    progress = progress and processes.rank == 0
    with _timed(seconds, "prepare"), processes.fail_together():
        plan = make_plan(config, model, processes, store.is_whole)
        outcome = Outcome(plan, seconds=seconds)
        outcome.not_corrected = _why_not_corrected(plan, batches)
        batch_norms = [] if outcome.not_corrected else _batch_norms(plan)
        reader = config.data_reader or ("keep_batch_norm=False" if batch_norms else None)
        data = CalibrationBatches(model, batches, forward, predict, processes, reader, store.make_parking)
        allocate_first = not plan.is_one_pass or config.reads_gradients
        permutes = config.permutation.reads_batches
        if config.data_reader and (allocate_first or config.recovery.reads_batches):
            data.read_all(progress)  # the batches run several times, or side by side
    with _timed(seconds, "permute", permutes), pruning_mode(model):
        outcome.permuted = permute(plan, data, store, progress) if permutes else None
    with _timed(seconds, "normalize", bool(batch_norms)), pruning_mode(model):
        statistics = BatchNormStatistics(batch_norms, data, processes)
    if allocate_first:
        with _timed(seconds, "allocate", config.allocation.reads_weights):
            observe = partial(_observe_dense_model, plan, data, store, progress)
            outcome.selections = _allocate(plan, data, store, observe, progress)
    recovers = config.recovery.reads_batches and config.sparsity > 0
    with _timed(seconds, "recover", recovers), pruning_mode(model):
        dense = DenseModel(model, plan.layers, plan.blocks, data, processes, progress)
        recovery = config.recovery.start_model(dense) if recovers else ModelRecovery()
    with _timed(seconds, "prune"), pruning_mode(model), _naming_what_was_written(outcome, store.advice):
        _prune_units(plan, data, outcome, store, progress)
    torch.clear_autocast_cache()  # it holds casts of the dense weights
    with _timed(seconds, "normalize", bool(batch_norms)), pruning_mode(model):
        outcome.batch_norm = statistics.correct()
    with _timed(seconds, "recover", recovers), pruning_mode(model):
        outcome.training = recovery.train()
    return _make_report(outcome, data.total, store.zeros)


def prune_collected(plan: Plan, passive: PassiveCalibration) -> PruningReport:
    """Prune with the statistics that were collected from forward passes of the dense model.

    Raises:
        ValueError: Before any weight is written, if there was no batch or an activation is NaN or infinite.
    """
    outcome = Outcome(plan)
    if _batch_norms(plan):
        outcome.not_corrected = "the batches of a validation loop run only once"
    if plan.config.permutation.reads_batches:
        outcome.permuted = Permuted(why_not="the batches of a validation loop run only once")
    with (
        _timed(outcome.seconds, "prune"),
        torch.inference_mode(False),
        torch.no_grad(),
        _naming_what_was_written(outcome),
    ):
        inputs, batches = passive.finish()
        outcome.selections = plan.allocate(inputs)
        _prune_unit(outcome, plan.whole_model, inputs, passive.observer)
    torch.clear_autocast_cache()  # it holds casts of the dense weights
    return _make_report(outcome, batches)


def _batch_norms(plan: Plan) -> list[nn.Module]:
    """Return the BatchNorm layers whose statistics change, if they can be."""
    return batch_norm_layers(plan.model) if not plan.config.keep_batch_norm else []


def _why_not_corrected(plan: Plan, batches: object) -> str:
    if not _batch_norms(plan):
        return ""
    if is_sharded(plan.model):
        return "the model is sharded"
    return "no calibration batches were given" if batches is None else ""


def _prune_units(plan: Plan, data: CalibrationBatches, outcome: Outcome, store: WeightStore, progress: bool) -> None:
    """Observe, prune and recover each unit in turn; if blocks are loaded for one pass, observe all of them first."""
    config, in_parts = plan.config, plan.is_one_pass and not store.is_whole
    total = 2 * len(plan.units) if in_parts else data.length if plan.is_one_pass else len(plan.units)
    revisited: set[int] = set()
    with ProgressBar("Pruning", total, progress) as bar:
        tick = bar.advance if plan.is_one_pass and store.is_whole else lambda: None
        observer = Observer(plan.observed, data.masks, tick, plan.processes, config.min_expert_tokens)
        inputs: Mapping[str, InputStatistics] = {}
        if in_parts:
            inputs = _watch(plan, data, observer, store, bar)
            if not outcome.selections:
                outcome.selections = _allocate(plan, data, store, lambda: (inputs, {}), progress=False)
        observes = bool(plan.observed) and not in_parts
        stops: Generator[UnitStop]
        if observes:
            stops = calibrate(plan.model, plan.units, data, plan.processes, revisited)
        else:
            stops = (UnitStop(unit, (), lambda: None) for unit in plan.units)
        with closing(stops):
            for stop in stops:
                unit = stop.unit
                bar.show(f"{unit.name}{store.status}")
                if not store.arrive(unit, outcome):
                    recovery = config.recovery.start(unit, data.masks)
                    if observes:
                        inputs = observer(unit, recovery.record(stop.calls))
                    stop.check()
                    del stop  # or its parked activations would outlive the run of the pruned unit
                    if not outcome.selections:
                        outcome.selections = plan.allocate(inputs)
                    _prune_unit(outcome, unit, inputs, observer)
                    if observes:
                        inputs = {}  # frees the statistics before the recovery
                    for part in recovery.train(bar.show):
                        for name in part.layers & outcome.layers.keys():
                            outcome.layers[name].part = TrainedPart(part.name, part.before, part.after)
                if in_parts or not plan.is_one_pass:
                    bar.advance()
        store.finish(outcome)
    outcome.revisited = {layer.name for index in revisited for layer in plan.units[index].layers}


def _allocate(
    plan: Plan, data: CalibrationBatches, store: WeightStore, observe: Callable[[], Observed], progress: bool
) -> Selections:
    """Give each layer its sparsity, from what `observe` finds in the dense model."""
    if selections := store.recall(plan):
        data.count()
        return selections
    found = observe()
    with store.dense():
        selections = plan.allocate(*found, progress, store.hold)
    store.keep(selections)
    return selections


def _observe_dense_model(plan: Plan, data: CalibrationBatches, store: WeightStore, progress: bool) -> Observed:
    """Collect the input statistics and the gradients that allocation and pattern read."""
    allocation, model, processes = plan.config.allocation, plan.model, plan.processes
    inputs: Mapping[str, InputStatistics] = {}
    gradients: Mapping[str, GradientStatistics] = {}
    if allocation.needs:
        total = data.length if store.is_whole else len(plan.parts)
        with pruning_mode(model), ProgressBar("Observing", total, progress) as bar:
            tick = bar.advance if store.is_whole else lambda: None
            observer = Observer(allocation.needs, data.masks, tick, processes, plan.config.min_expert_tokens)
            if store.is_whole:
                for stop in calibrate(model, (plan.whole_model,), data, processes, set()):
                    inputs = observer(stop.unit, stop.calls)
                    stop.check()
            else:
                inputs = _watch(plan, data, observer, store, bar)
    if plan.config.reads_gradients:
        gradients = _pass_backward(plan, data, store, progress)
        data.refuse_if_empty()
    return inputs, gradients


def _pass_backward(
    plan: Plan, data: CalibrationBatches, store: WeightStore, progress: bool
) -> Mapping[str, GradientStatistics]:
    model, limit = plan.model, plan.config.allocation.gradient_limit
    total = data.length if store.is_whole else None
    with pruning_mode(model), ProgressBar("Passing backward", total, progress) as bar:
        if store.is_whole:
            return gradient_statistics(model, plan.layers, plan.blocks, data, bar.advance, plan.processes, limit)

        def hold(name: str) -> None:
            bar.show(f"{name}{store.status}")
            store.hold(name)

        with store.dense():
            return gradient_statistics_by_block(model, plan.layers, plan.block_units, data, hold, limit)


def _watch(
    plan: Plan, data: CalibrationBatches, observer: Observer, store: WeightStore, bar: ProgressBar
) -> Mapping[str, InputStatistics]:
    """Return the statistics of all layers from one pass through the dense model, block by block."""
    with store.dense():
        for unit in watch_units(plan.parts, data, observer, store.hold):
            bar.show(f"{unit.name}{store.status}")
            bar.advance()
    return observer.finish(plan.whole_model)


def _prune_unit(outcome: Outcome, unit: Unit, inputs: Mapping[str, InputStatistics], observer: Observer) -> None:
    """Prune the layers that the batches reached, and leave the others dense with a reason."""
    plan = outcome.plan
    reshard(unit.module or plan.model)
    with plan.processes.fail_together():
        reached: list[Layer] = []
        for layer in unit.layers:
            if skipped := _left_dense(layer, inputs.get(layer.name, InputStatistics())) if plan.observed else None:
                outcome.skipped[layer.name] = skipped
            else:
                reached.append(layer)
        statistics = InputStatistics()
        for layers in _by_input(reached, inputs):
            if (following := inputs.get(layers[0].name, InputStatistics())) is not statistics:
                statistics.forget_derived()
            statistics = following
            for pruned in _prune_layers(outcome, layers, statistics):
                pruned.tokens = observer.pooled.get(pruned.name, pruned.tokens)
                pruned.note = "; ".join(_layer_notes(outcome, pruned, statistics, observer))
                outcome.layers[pruned.name] = pruned
        outcome.few_tokens = {**outcome.few_tokens, **observer.pooled}


def _left_dense(layer: Layer, inputs: InputStatistics) -> SkippedMatrix | None:
    if inputs.count == 0 and layer.expert is not None:
        detail = "no calibration token was observed in any expert of the module"
        return SkippedMatrix(layer.name, layer.stored_shape, SkipReason.UNROUTED, detail)
    if inputs.count == 0:
        return _unreached(layer)
    if bool(inputs.inactive().all()):
        return SkippedMatrix(layer.name, layer.stored_shape, SkipReason.INACTIVE, "all its inputs were zero")
    return None


def _unreached(layer: Layer) -> SkippedMatrix:
    return SkippedMatrix(layer.name, layer.stored_shape, SkipReason.UNREACHED, "no calibration batch called it")


_MAX_GROUP = 1 << 28  # weights: 1 GiB in float32, and up to four times that in the solver


def _by_input(layers: Iterable[Layer], inputs: Mapping[str, InputStatistics]) -> Iterator[list[Layer]]:
    """Group layers that share one input; split a group that is too large for memory."""
    groups: dict[object, dict[str, list[Layer]]] = {}
    for layer in layers:
        # Each expert is a group of its own, since a hundred of them may share pooled statistics. These groups follow
        # each other, so that what is derived from the statistics is computed once.
        shared = groups.setdefault(inputs.get(layer.name, layer.name), {})
        shared.setdefault(layer.name if layer.siblings else "", []).append(layer)
    for group in (group for shared in groups.values() for group in shared.values()):
        part: list[Layer] = []
        for layer in group:
            if part and sum(other.size for other in (*part, layer)) > _MAX_GROUP:
                yield part
                part = []
            part.append(layer)
        yield part


def _prune_layers(outcome: Outcome, layers: Sequence[Layer], inputs: InputStatistics) -> Iterator[PrunedLayer]:
    """Solve layers that share one input, and write their weights."""
    weights = {layer.name: layer.read() for layer in layers}
    rows = {name: weight for name, weight in weights.items() if len(weight)}  # a process may hold no row of a layer
    solved: dict[str, Weight] = {}
    if rows:
        device = next(iter(rows.values())).device
        with torch.autocast(device.type, enabled=False):  # a mixed-precision Trainer's would round the statistics
            selections = [outcome.selections[name] for name in rows]
            pairs = outcome.plan.config.solver.solve_together([*rows.values()], inputs, selections)
        solved = {name: weight for name, (weight, _) in zip(rows, pairs, strict=True)}
    for layer in layers:
        target, block = outcome.selections[layer.name].sparsity, outcome.plan.inventory.blocks[layer.name]
        pruned = PrunedLayer(layer.name, layer.shape, target, 0.0, inputs.count, siblings=layer.siblings, block=block)
        if layer.name in solved:
            dense, sparse = weights[layer.name], solved[layer.name]
            pruned.before, pruned.sparsity = _share_of_zeros(dense), _share_of_zeros(sparse)
            if "gram" in inputs.sums and not isinstance(layer.parameter, DTensor):
                pruned.error = relative_error(dense, sparse, inputs.sums["gram"])
            layer.write(sparse)
        yield pruned


def _share_of_zeros(weight: Weight) -> float:
    return int((weight == 0).count_nonzero()) / weight.numel()


def _layer_notes(outcome: Outcome, pruned: PrunedLayer, inputs: InputStatistics, observer: Observer) -> Iterator[str]:
    if outcome.permuted and pruned.name in outcome.permuted.kept:
        before, after = outcome.permuted.kept[pruned.name]
        yield f"inputs permuted: kept score {after / before - 1:+.2%}"
    has_energy = inputs.sums.keys() & {"square_sum", "gram"}
    if inputs.count and has_energy and (inactive := int(inputs.inactive().count_nonzero())):
        yield f"{inactive} inputs never active"
    if pruned.name in observer.padding_counted:
        yield "padding counted: the attention_mask does not show which inputs are padding"
    if pruned.name in observer.not_routed:
        yield "every token counted: the model passes all tokens to every expert"
    if pruned.name in observer.pooled:
        yield POOLED


def _make_report(outcome: Outcome, batches: int, stored_zeros: int = 0) -> PruningReport:
    started = time.perf_counter()
    plan = outcome.plan
    for layer in plan.layers:
        if layer.name not in outcome.layers and layer.name not in outcome.skipped:  # no batch reached its unit
            outcome.skipped[layer.name] = _unreached(layer)
    if not outcome.layers and plan.config.sparsity > 0:
        raise UserError(
            f"batches must reach the layers, but no token except padding reached any of the {len(plan.layers)} layers, "
            "so nothing was pruned. Check that the batches hold more than padding and that forward= runs the model."
        )
    shards = [layer for layer in plan.layers if layer.name in outcome.layers and isinstance(layer.parameter, DTensor)]
    for layer, count in zip(shards, zero_counts([s.parameter for s in shards], plan.processes), strict=True):
        outcome.layers[layer.name].sparsity = count / layer.size
    notes = notes_on(outcome)
    for note in notes:
        if note.is_warning and plan.processes.rank == 0:
            log.warning(note.text)
    parameters = [p for p in plan.model.parameters() if not isinstance(p, UninitializedParameter)]
    # The zeros of a parameter that is one pruned layer are known; to count them again would read every weight.
    known = {
        id(layer.parameter): outcome.layers[layer.name].zeros
        for layer in plan.layers
        if layer.name in outcome.layers and layer.size == layer.parameter.numel() and not is_unloaded(layer.parameter)
    }
    others = [p for p in parameters if id(p) not in known and not is_wrapper(p) and not is_unloaded(p)]
    zeros = stored_zeros + sum(known.values()) + sum(zero_counts(others, plan.processes))
    outcome.seconds["report"] = time.perf_counter() - started
    return PruningReport(
        layers=[outcome.layers[n.name] for n in plan.layers if n.name in outcome.layers],
        skipped=[*plan.inventory.skipped, *(outcome.skipped[n.name] for n in plan.layers if n.name in outcome.skipped)],
        parameters=sum(parameter.numel() for parameter in parameters),
        zeros=zeros,
        seconds=outcome.seconds,
        config={"preset": plan.config.preset, **plan.config.describe(), "calibration_batches": batches},
        notes=[note.text for note in notes],
        training=outcome.training,
    )


@contextmanager
def _timed(seconds: dict[str, float], stage: str, is_reported: bool = True) -> Iterator[None]:
    """Add the time of this block to a stage of the report; a stage that does nothing is left out."""
    started = time.perf_counter()
    try:
        yield
    finally:
        if is_reported:
            seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - started


def _naming_what_was_written(outcome: Outcome, advice: str = WeightStore.advice) -> AbstractContextManager[None]:
    """If pruning fails halfway, add to the error which layers are already pruned."""

    def written() -> str:
        if not (names := list(outcome.layers)):
            return ""
        layers = f"{len(names)} layers are already pruned, from {names[0]} to {names[-1]}; the others are dense. "
        return layers + advice

    return noting(written, log.error)
