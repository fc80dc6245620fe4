"""Prune a model in one shot: the only place that knows the order of the steps."""

from __future__ import annotations

import inspect
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import UninitializedParameter

from wanda_lightning.calibration.batch_thread import park
from wanda_lightning.calibration.gradients import fisher
from wanda_lightning.calibration.interception import Product, WeightInterceptor
from wanda_lightning.calibration.lockstep import Stop, lockstep, whole_model_stop
from wanda_lightning.calibration.observer import Observer
from wanda_lightning.config import PruningConfig
from wanda_lightning.core.allocation import Allocation, DenseLayer, Uniform
from wanda_lightning.core.criteria import Criterion
from wanda_lightning.core.patterns import NM, Pattern, Unstructured
from wanda_lightning.core.selection import Selection
from wanda_lightning.core.solvers import Reconstruct, Solver, ZeroOut
from wanda_lightning.core.statistics import InputStatistics
from wanda_lightning.core.types import Weight
from wanda_lightning.models import (
    Inventory,
    Layer,
    TokenMask,
    Unit,
    calibration_mode,
    is_wrapper,
    left_by_pattern,
    low_coverage,
    token_masks,
)
from wanda_lightning.parallel import (
    SINGLE_PROCESS,
    ForwardOrderCheck,
    Processes,
    is_sharded,
    reset_fsdp_on_exit,
    reshard,
    zero_counts,
)
from wanda_lightning.progress import ProgressBar
from wanda_lightning.recovery.reconstruct import Part, recorded, train
from wanda_lightning.refusals import refuse_sharding, refuse_too_wide, refuse_training_together, refuse_unprunable
from wanda_lightning.report import PrunedLayer, PruningReport, SkippedMatrix

log = logging.getLogger(__name__)


def prune(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    sparsity: float = 0.5,
    *,
    criterion: Criterion | str | None = None,
    pattern: Pattern | str = Unstructured(),
    allocation: Allocation | str = Uniform(),
    solver: Solver | str = ZeroOut(),
    sequential: str = "block",
    skip: Sequence[str] = (),
    only: Sequence[str] = (),
    include_grouped: bool = False,
    min_expert_tokens: int = 32,
    forward: Callable[[Any], object] | None = None,
    progress: bool = True,
) -> PruningReport:
    """Prune any model in place: its smallest weights, by a score, become zero.

    One batch goes through the model by `forward(batch)`, by default `model(**batch)` for a mapping, of which the
    model is given what its forward takes, `model(batch[0])` for a tuple or list, and `model(batch)` for a tensor.
    Where a mapping has an `attention_mask`, its zeros are padding, which does not count. Nothing else is padding:
    `position_ids` that start again (packed documents) leave no token out.

    Args:
        model: The model; its weights change in place, everything else is as before.
        batches: Calibration batches, all of which are used; not needed for `Magnitude`.
        sparsity: See `PruningConfig` for this and the choices that follow.
        criterion: Gives scores; by default the solver's own.
        pattern: Where zeros may fall.
        allocation: Spreads the sparsity over the layers.
        solver: Gives the final weights.
        sequential: What the statistics see.
        skip: Layers to leave dense.
        only: The layers to prune, where not all.
        include_grouped: Prune grouped convolutions, too.
        min_expert_tokens: Experts that saw fewer are pruned by what all experts saw.
        forward: How one batch goes through the model.
        progress: Show a bar (plain lines where there is no terminal).

    Returns:
        What happened to every matrix.

    Raises:
        ValueError: If something cannot be pruned as asked, before any weight is written; or if an activation holds
            NaN or infinity.
    """
    config = PruningConfig(
        sparsity,
        criterion,
        pattern,
        allocation,
        solver,
        sequential,
        skip,
        only,
        include_grouped,
        min_expert_tokens,
    )
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
) -> PruningReport:
    """`prune` with its choices in one object, and by several processes together.

    Args:
        config: The choices.
        model: The model; in each process the same, or the same sharded by FSDP2 (`fully_shard`) on dimension 0.
        batches: Calibration batches of this process.
        forward: How one batch goes through the model.
        predict: How it gives the logits, for an allocation that reads gradients; by default as `forward`.
        progress: Show a bar, in the first process.
        processes: Those that all call this, with the same choices. The statistics are of the batches of all, and so
            are the masks; an error in one ends all.
    """
    seconds: dict[str, float] = {}
    progress = progress and processes.rank == 0
    with _timed(seconds, "prepare"), processes.fail_together():
        reshard(model)
        found = plan(config, model, processes)
        if config.reads_batches and (batches is None or isinstance(batches, Mapping | Tensor)):
            given = "none were" if batches is None else f"one {type(batches).__name__} was"
            raise ValueError(
                f"{config.reader} needs calibration batches, but {given} given. Give a list of batches or a "
                "dataloader; Magnitude() with Uniform() needs none."
            )
        read = batches if config.reads_batches and batches is not None else ()
        calibration = _Calibration(model, read, forward, predict, processes)
        allocation = cast(Allocation, config.allocation)
        one_pass = bool(config.needs) and config.sequential == "none"
        before = not one_pass or allocation.reads_gradients  # else the one pass sees the dense model
        if before:
            calibration.read_all()
    observed = config.needs if one_pass else config.unit_needs
    targets: LayerTargets = {}
    if before:
        with _timed(seconds, "allocate") if allocation.reads_weights else nullcontext():
            seen = _see_dense(config, model, found, calibration, processes, progress)
            targets = _allocate(config, model, found, seen, processes, progress)
            del seen
    pruned: list[PrunedLayer] = []
    dense: dict[str, str] = {}
    with (
        _running(model),
        ProgressBar("Pruning", calibration.length if one_pass else len(found.units), progress) as bar,
        _naming_what_was_written(pruned),
        _timed(seconds, "prune"),
        ForwardOrderCheck(model, processes) as path,
        reset_fsdp_on_exit(model) if observed else nullcontext(),
        closing(_stops(config, observed, found, calibration, processes)) as stops,
    ):
        tick = bar.advance if one_pass else lambda: None
        observer = Observer(observed, calibration.masks, tick, processes, config.min_expert_tokens)
        for stop in stops:
            unit = found.units[stop.unit]
            bar.show(unit.name)
            if not one_pass:
                path.check(unit.name, len(tuple(stop.calls)))
            parts: list[Part] = []
            calls = stop.calls
            if isinstance(config.solver, Reconstruct):
                parts, calls = recorded(unit, calls, calibration.masks)
            statistics = observer(unit, calls) if observed else None
            del stop, calls  # or its parked activations outlive the run of the pruned unit
            if one_pass:
                path.check(unit.name, 0)
                calibration.refuse_if_empty(config)
            if not before:
                targets = _allocate(config, model, found, _Dense(statistics or {}), processes, progress=False)
            reshard(unit.module or model)
            with processes.fail_together():
                _prune_unit(config, unit, statistics, targets, observer, pruned, dense)
            while parts:
                part = parts.pop(0)
                bar.show(part.name)
                if part.runs:
                    _train_part(config, part, calibration.masks, pruned)
            if not one_pass:
                bar.advance()
    torch.clear_autocast_cache()  # casts of the dense weights
    with _timed(seconds, "report"):
        return _report(
            config, model, found, targets, pruned, dense, seconds, calibration.total, processes, observer.pooled
        )


class PassiveCalibration:
    """Prune by forward passes that run anyway, such as those of a validation loop: at sequential `model`, for nothing.

        watched = PassiveCalibration(config, model)
        for batch in batches:
            with watched.batch(batch):
                model(batch)
        report = watched.prune()

    Args:
        config: The choices; sequential is `"model"`.
        model: The model.
        processes: Those that do this together.

    Raises:
        ValueError: If something cannot be pruned as asked.
    """

    def __init__(self, config: PruningConfig, model: nn.Module, processes: Processes = SINGLE_PROCESS) -> None:
        assert config.sequential == "none", "the forward passes see the dense model"
        assert not cast(Allocation, config.allocation).reads_gradients, "and nothing goes backward"
        self._config, self._model, self._processes = config, model, processes
        with processes.fail_together():
            reshard(model)
            self._found = plan(config, model, processes)
        self._masks: list[tuple[TokenMask, ...] | None] = []
        self._observer = Observer(
            config.needs, self._masks, processes=processes, min_expert_tokens=config.min_expert_tokens
        )

    @contextmanager
    def batch(self, batch: Any) -> Iterator[None]:
        """Read the inputs of all layers while the batch runs."""
        self._masks.append(token_masks(self._model, batch))
        with calibration_mode(self._model), self._observer.collect(self._found.units[0], len(self._masks) - 1):
            yield

    def prune(self) -> PruningReport:
        """Prune by what was seen.

        Raises:
            ValueError: If no batch was, or an activation held NaN or infinity; before any weight is written.
        """
        config, (unit,), processes = self._config, self._found.units, self._processes
        seconds: dict[str, float] = {}
        pruned: list[PrunedLayer] = []
        dense: dict[str, str] = {}
        with torch.inference_mode(False), torch.no_grad(), _naming_what_was_written(pruned), _timed(seconds, "prune"):
            statistics = self._observer.finish(unit)
            batches = torch.tensor(len(self._masks))
            processes.all_reduce_sum([batches])
            if not batches:
                raise ValueError(f"{config.reader} needs batches that run through the model, but none did")
            targets = _allocate(config, self._model, self._found, _Dense(statistics), processes, progress=False)
            reshard(self._model)
            with processes.fail_together():
                _prune_unit(config, unit, statistics, targets, self._observer, pruned, dense)
        torch.clear_autocast_cache()  # casts of the dense weights
        with _timed(seconds, "report"):
            pooled = self._observer.pooled
            return _report(
                config, self._model, self._found, targets, pruned, dense, seconds, int(batches), processes, pooled
            )


def plan(config: PruningConfig, model: nn.Module, processes: Processes = SINGLE_PROCESS) -> Inventory:
    """What would be pruned; nothing is changed.

    Raises:
        ValueError: If something cannot be pruned as asked.
    """
    found = config.find_layers(model)
    refuse_unprunable(config, found)
    refuse_training_together(config, processes)
    if "gram" in config.needs:
        refuse_too_wide(config, found, model)
    for unit in found.units:
        for layer in unit.layers:
            refuse_sharding(config, model, unit, layer, processes)
    cast(Allocation, config.allocation).check(_dense_layers(config, model, found.layers), config.sparsity)
    return found


LayerTargets = Mapping[str, tuple[Pattern, float]]  # of each layer


class _Dense(NamedTuple):
    """What an allocation may know of the layers of the dense model, by name; a layer that no batch reaches is missing.

    Attributes:
        statistics: Of the inputs.
        fisher: See `gradients.fisher`.
    """

    statistics: Mapping[str, InputStatistics] = MappingProxyType({})
    fisher: Mapping[str, Tensor] = MappingProxyType({})

    def knows(self, allocation: Allocation, layer: Layer) -> bool:
        """Whether everything is there that the allocation reads."""
        if allocation.reads_gradients and layer.name not in self.fisher:
            return False
        return not allocation.needs or _was_reached(self.statistics.get(layer.name))


def _see_dense(
    config: PruningConfig,
    model: nn.Module,
    found: Inventory,
    calibration: _Calibration,
    processes: Processes,
    progress: bool,
) -> _Dense:
    """What the allocation needs to know of all layers, in passes before anything is pruned."""
    allocation = cast(Allocation, config.allocation)
    statistics: Mapping[str, InputStatistics] = {}
    gradients: Mapping[str, Tensor] = {}
    if allocation.needs:
        with (
            _running(model),
            ProgressBar("Observing", calibration.length, progress) as bar,
            ForwardOrderCheck(model, processes) as path,
            reset_fsdp_on_exit(model),
        ):
            observer = Observer(allocation.needs, calibration.masks, bar.advance, processes, config.min_expert_tokens)
            statistics = observer(Unit("", None, found.layers), whole_model_stop(calibration).calls)
            path.check("", 0)
            calibration.refuse_if_empty(config)
    if allocation.reads_gradients:
        with _running(model), ProgressBar("Passing backward", calibration.length, progress) as bar:
            forwards, samples = calibration.predictions(), allocation.gradient_samples
            gradients = fisher(model, found.layers, forwards, calibration.masks, bar.advance, processes, samples)
            calibration.refuse_if_empty(config)
    return _Dense(statistics, gradients)


def _allocate(
    config: PruningConfig,
    model: nn.Module,
    found: Inventory,
    dense: _Dense,
    processes: Processes,
    progress: bool,
) -> LayerTargets:
    """To which pattern and sparsity each layer is pruned, the same in all processes."""
    allocation, pattern = cast(Allocation, config.allocation), cast(Pattern, config.pattern)
    layers = [layer for layer in found.layers if dense.knows(allocation, layer)]
    sparsities: dict[str, float] = {}
    seen: set[str] = set()

    def reading(name: str) -> None:
        bar.show(name)
        bar.advance(name not in seen)
        seen.add(name)

    with (
        processes.fail_together(),
        ProgressBar("Allocating", len(layers), progress and allocation.reads_weights) as bar,
    ):
        if processes.rank == 0 and layers:
            sparsities = allocation(_dense_layers(config, model, layers, dense, reading), config.sparsity)
        # Not by each for itself: a singular value that differs in its last digit could make other masks.
        sparsities = processes.broadcast(sparsities, 0)
    every = {layer.name: sparsities.get(layer.name, config.sparsity) for layer in found.layers}
    return {name: (pattern.for_sparsity(sparsity), sparsity) for name, sparsity in every.items()}


def _dense_layers(
    config: PruningConfig,
    model: nn.Module,
    layers: Sequence[Layer],
    dense: _Dense = _Dense(),
    reading: Callable[[str], None] = lambda name: None,
) -> list[DenseLayer]:
    """Layers as an allocation sees them; `reading` hears of each weight that is read."""
    blocks = {layer.name: unit.name for unit in config.find_layers(model, "block").units for layer in unit.layers}

    def read(layer: Layer) -> Tensor:
        reading(layer.name)
        return layer.read()

    return [
        DenseLayer(
            layer.name,
            blocks[layer.name],
            layer.size,
            cast(Pattern, config.pattern).sparsity_steps(*layer.shape),
            partial(read, layer),
            dense.statistics.get(layer.name, InputStatistics()),
            dense.fisher.get(layer.name),
        )
        for layer in layers
    ]


def _was_reached(inputs: InputStatistics | None) -> bool:
    return inputs is not None and inputs.count > 0


class _Calibration:
    """The calibration batches as forward passes, each with its padding."""

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        forward: Callable[[Any], object] | None,
        predict: Callable[[Any], object] | None,
        processes: Processes,
    ) -> None:
        self._model, self._batches, self._processes = model, batches, processes
        self._forward = forward or self._forward_on_device
        self._predict = predict or self._forward
        # FSDP2 communicates in every forward pass: each process must make equally many.
        self.even = processes.world_size > 1 and is_sharded(model)
        self.masks: list[tuple[TokenMask, ...] | None] = []
        self.total = 0  # batches of all processes
        self.length = len(batches) if isinstance(batches, Sized) else None

    def _forward_on_device(self, batch: Any) -> object:
        device = next(self._model.parameters()).device
        return forward_batch(self._model, _on_device(batch, device))

    def read_all(self) -> None:
        """Hold all batches, to go through the model together."""
        self._batches = held = list(self._batches)
        self.length = len(held)

    def __iter__(self) -> Iterator[Callable[[], object]]:
        return self._passes(self._forward)

    def predictions(self) -> Iterator[Callable[[], object]]:
        """Forward passes that give the logits."""
        return self._passes(self._predict)

    def _passes(self, forward: Callable[[Any], object]) -> Iterator[Callable[[], object]]:
        batches = _evenly(self._batches, self._processes) if self.even else ((batch, True) for batch in self._batches)
        self.masks.clear()
        for batch, counts in batches:
            self.masks.append(token_masks(self._model, batch) if counts else None)
            yield partial(forward, batch)

    def refuse_if_empty(self, config: PruningConfig) -> None:
        total = torch.tensor(sum(mask is not None for mask in self.masks))
        self._processes.all_reduce_sum([total])
        self.total = int(total)
        if not self.total:
            raise ValueError(
                f"{config.reader} needs calibration batches, but what was given holds none. An iterator that was "
                "read before is empty: give a list or a dataloader."
            )


_NONE_LEFT = object()


def _evenly(batches: Iterable[Any], processes: Processes) -> Iterator[tuple[Any, bool]]:
    """Equally many batches in each process, each with whether it counts: where they run out, the last one again."""
    iterator = iter(batches)
    last: Any = _NONE_LEFT
    while True:
        with processes.fail_together():
            batch = next(iterator, _NONE_LEFT)
        holder = processes.all_reduce_min(processes.world_size if batch is _NONE_LEFT else processes.rank)
        if holder == processes.world_size:
            return
        if last is _NONE_LEFT and processes.all_reduce_min(batch is not _NONE_LEFT) == 0:
            last = processes.broadcast(batch if processes.rank == holder else None, holder)
        last = last if batch is _NONE_LEFT else batch
        yield last, batch is not _NONE_LEFT


def _stops(
    config: PruningConfig, observed: frozenset[str], found: Inventory, calibration: _Calibration, processes: Processes
) -> Generator[Stop]:
    """Where the weights of each unit may be chosen."""
    if not observed:
        yield from (Stop(index, ()) for index in range(len(found.units)))
    elif config.sequential == "none":
        yield whole_model_stop(calibration)
    else:
        forwards = list(calibration)
        calibration.refuse_if_empty(config)
        yield from lockstep(
            _stopping_at_products(forwards, found.units),
            [cast(nn.Module, unit.module) for unit in found.units],
            processes,
        )


def _stopping_at_products(forwards: list[Callable[[], object]], units: Sequence[Unit]) -> list[Callable[[], object]]:
    """Forward passes that also stop where the weight of a unit that is a layer is multiplied past its forward."""
    alone = {
        layer: index
        for index, unit in enumerate(units)
        for layer in unit.layers
        if layer.module is unit.module and layer.expert is None
    }

    def stop(products: list[Product], multiply: Callable[[], Tensor]) -> Tensor:
        product = products[0]
        return park(alone[product.layer], lambda tokens: multiply(), product.tokens) if product.first else multiply()

    def watched(forward: Callable[[], object]) -> object:
        products = WeightInterceptor(alone, stop)  # each thread its own
        with products if products.watches else nullcontext():
            return forward()

    return [partial(watched, forward) for forward in forwards] if alone else forwards


_ALREADY_SPARSE = 0.05
_HELD_AT_ONCE = 1 << 28  # weights: 1 GiB in float32, and up to four times that while they are solved
_UNREACHED = "no calibration batch called it"
_UNROUTED = "no calibration token was seen to go through any expert of the module"
_ALL_ZERO = "all its inputs were zero"


def _prune_unit(
    config: PruningConfig,
    unit: Unit,
    statistics: Mapping[str, InputStatistics] | None,
    targets: LayerTargets,
    observer: Observer,
    pruned: list[PrunedLayer],
    dense: dict[str, str],
) -> None:
    """Prune what the batches reached; into `dense` goes why another layer was not."""
    together: dict[object, list[Layer]] = {}
    notes: dict[str, list[str]] = {}
    for layer in unit.layers:
        notes[layer.name] = []
        if statistics is not None:
            inputs = statistics.get(layer.name)
            if inputs is None or not _was_reached(inputs):
                dense[layer.name] = _UNREACHED if layer.expert is None else _UNROUTED
                continue
            inactive = int(inputs.inactive().count_nonzero())
            if inactive == layer.shape[1]:
                dense[layer.name] = _ALL_ZERO
                continue
            if inactive:
                notes[layer.name].append(f"{inactive} inputs never active")
        if layer.name in observer.padding_counted:
            notes[layer.name].append("padding counted: inputs do not line up with the attention_mask")
        if layer.name in observer.not_routed:
            notes[layer.name].append("every token counted: the model gives each to all experts")
        # Experts, of which a hundred may have the statistics of all, are not held at once.
        key = layer.name if statistics is None or layer.siblings else statistics[layer.name]
        together.setdefault(key, []).append(layer)
    for layers in (part for same in together.values() for part in _held_at_once(same)):
        inputs = InputStatistics() if statistics is None else statistics[layers[0].name]
        for done in _prune_layers(config, layers, inputs, targets):
            pruned.append(done)
            if done.name in observer.pooled:
                done.tokens = observer.pooled[done.name]
                notes[done.name].append("few tokens: pruned with those of all experts")
            done.note = "; ".join(notes[done.name])


def _held_at_once(layers: Sequence[Layer]) -> Iterator[list[Layer]]:
    """Not the keys and values of all layers of a decoder, which are of one input."""
    part: list[Layer] = []
    for layer in layers:
        if part and sum(other.size for other in (*part, layer)) > _HELD_AT_ONCE:
            yield part
            part = []
        part.append(layer)
    yield part


def _prune_layers(
    config: PruningConfig, layers: Sequence[Layer], inputs: InputStatistics, targets: LayerTargets
) -> Iterator[PrunedLayer]:
    """Prune layers with the same inputs."""
    solver, criterion = cast(Solver, config.solver), cast(Criterion, config.criterion)
    weights = {layer.name: layer.read() for layer in layers}
    rows = {name: weight for name, weight in weights.items() if len(weight)}  # a process may have none of a small one
    solved: dict[str, Weight] = {}
    if rows:
        device = next(iter(rows.values())).device
        with torch.autocast(device.type, enabled=False):  # a mixed-precision Trainer's would round it
            selections = [Selection(criterion, *targets[name]) for name in rows]
            pairs = solver.solve_together([*rows.values()], inputs, selections)
        solved = {name: weight for name, (weight, _) in zip(rows, pairs, strict=True)}
    for layer in layers:
        before = sparsity = 0.0
        if layer.name in solved:
            before = _zeros(weights[layer.name])
            layer.write(solved[layer.name])
            sparsity = _zeros(solved[layer.name])
        tokens, target = inputs.count, targets[layer.name][1]
        yield PrunedLayer(layer.name, layer.shape, target, sparsity, tokens, siblings=layer.siblings, before=before)


def _zeros(weight: Weight) -> float:
    return int((weight == 0).count_nonzero()) / weight.numel()


def _train_part(
    config: PruningConfig, part: Part, masks: Sequence[tuple[TokenMask, ...] | None], pruned: list[PrunedLayer]
) -> None:
    before, after = train(part, cast(Reconstruct, config.solver), masks)
    names = {layer.name for layer in part.layers}
    for layer in pruned:
        if layer.name in names:
            trained = f"error of {part.name} {before:.2%}, trained {after:.2%}"
            layer.note = f"{layer.note}; {trained}" if layer.note else trained


def _report(
    config: PruningConfig,
    model: nn.Module,
    found: Inventory,
    targets: LayerTargets,
    pruned: list[PrunedLayer],
    dense: Mapping[str, str],
    seconds: dict[str, float],
    batches: int,
    processes: Processes,
    pooled: Mapping[str, int],
) -> PruningReport:
    done = {layer.name: layer for layer in pruned}
    shards = [layer for layer in found.layers if layer.name in done and isinstance(layer.parameter, DTensor)]
    for layer, zeros in zip(shards, zero_counts([layer.parameter for layer in shards], processes), strict=True):
        done[layer.name].sparsity = zeros / layer.size
    skipped = [SkippedMatrix(matrix.name, matrix.shape, matrix.reason) for matrix in found.skipped]
    left = {layer.name: dense.get(layer.name, _UNREACHED) for layer in found.layers if layer.name not in done}
    skipped.extend(
        SkippedMatrix(layer.name, layer.stored_shape, left[layer.name]) for layer in found.layers if layer.name in left
    )
    notes = []
    for reason, why in (
        (_UNREACHED, "no calibration batch called"),
        (_UNROUTED, "no calibration token was seen in"),
        (_ALL_ZERO, "all inputs were zero of"),
    ):
        if names := [name for name in left if left[name] == reason]:
            notes.append(f"{why} {len(names)} layers, {names[0]} first: left dense")
            if processes.rank == 0:
                log.warning(notes[-1])
    if pooled:
        least = min((done[name] for name in pooled if name in done), key=lambda layer: layer.tokens)
        notes.append(
            f"{len(pooled)} experts saw fewer than {max(1, config.min_expert_tokens)} tokens, {least.name} fewest: "
            f"{least.tokens}. They are pruned with what all experts saw: give more calibration samples"
        )
        if processes.rank == 0:
            log.warning(notes[-1])
    if sparse := [layer for layer in pruned if layer.before > _ALREADY_SPARSE]:
        most = max(sparse, key=lambda layer: layer.before)
        notes.append(
            f"{len(sparse)} layers were sparse already, {most.name} most: {most.before:.1%} zeros, which count towards "
            "their target"
        )
    for left_out in (left_by_pattern(found), low_coverage(found, left)):
        if left_out is not None:
            notes.append(left_out)
            if processes.rank == 0:
                log.warning(left_out)
    few = [layer for layer in pruned if layer.tokens < layer.shape[1] and layer.name not in pooled]
    if "gram" in config.needs and few:
        least = min(few, key=lambda layer: layer.tokens / layer.shape[1])
        notes.append(
            f"{len(few)} layers saw fewer tokens than they have inputs, {least.name} first: {least.tokens} of "
            f"{least.shape[1]}. Their Gram matrices rest on the dampening: give more calibration samples"
        )
        if processes.rank == 0:
            log.warning(notes[-1])
    short = [layer for layer in pruned if layer.target - layer.sparsity > 0.01 + 1 / layer.shape[1]]
    if short:
        worst = min(short, key=lambda layer: layer.sparsity)
        notes.append(
            f"{config.pattern} left {len(short)} layers short of their target, "
            f"{worst.name} most: {worst.sparsity:.1%} of {worst.target:.1%}"
        )
        if processes.rank == 0:
            log.warning(notes[-1])
    if isinstance(config.pattern, NM) and len(kinds := Counter(targets[layer.name][0] for layer in pruned)) > 1:
        counts = {f"{kind.n}:{kind.m}" if isinstance(kind, NM) else "dense": kinds[kind] for kind in kinds}
        notes.append(f"mixed N:M: {', '.join(f'{counts[kind]} layers {kind}' for kind in sorted(counts))}")
    order = {layer.name: index for index, layer in enumerate(found.layers)}
    pruned.sort(key=lambda layer: order[layer.name])
    # A parameter of which some layers are dense is counted as a whole; so are experts, which are many.
    partly = {id(layer.parameter) for layer in found.layers if layer.name not in done or layer.expert is not None}
    whole = {layer.name: layer.parameter for layer in found.layers if id(layer.parameter) not in partly}
    counted = {id(parameter) for parameter in whole.values()}
    parameters = [p for p in model.parameters() if not isinstance(p, UninitializedParameter)]
    others = [parameter for parameter in parameters if id(parameter) not in counted]
    return PruningReport(
        layers=pruned,
        skipped=skipped,
        parameters=sum(parameter.numel() for parameter in parameters),
        zeros=sum(done[name].zeros for name in whole)
        + sum(zero_counts([other for other in others if not is_wrapper(other)], processes)),
        seconds=seconds,
        config={**config.describe(), "calibration_batches": batches},
        notes=notes,
    )


def forward_batch(model: nn.Module, batch: Any) -> object:
    """Call a model on a batch: mappings become keywords, of tuples and lists the first element goes in.

    Raises:
        ValueError: If the model takes none of a mapping's keys.
    """
    if isinstance(batch, Mapping):
        parameters = inspect.signature(model.forward).parameters.values()
        if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
            accepted = {parameter.name for parameter in parameters}
            if not accepted & batch.keys():
                raise ValueError(
                    f"{type(model).__name__}.forward takes {sorted(accepted)}, but the batch has {sorted(batch)}. "
                    "Give forward=, or (in a LightningModule) define calibration_step(batch)."
                )
            batch = {key: value for key, value in batch.items() if key in accepted}
        return model(**batch)
    return model(batch[0] if isinstance(batch, tuple | list) else batch)


def _on_device(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        # Outside inference mode a model could not write into a tensor that was made inside.
        return batch.clone().to(device) if batch.is_inference() else batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _on_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return rebuild(batch, [_on_device(value, device) for value in batch])
    return batch


def rebuild(sequence: Any, values: list[Any]) -> Any:
    """The values as a list or tuple of the same type, named tuples included."""
    return type(sequence)(*values) if hasattr(sequence, "_fields") else type(sequence)(values)


def _uncompiled() -> AbstractContextManager[Any]:
    """Modules under `torch.compile` run as they are written: compiled code would trace what watches them."""
    # Nothing is compiled yet where this is not imported, which takes seconds.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def _running(model: nn.Module) -> Iterator[None]:
    """What a model needs around it to be calibrated and pruned."""
    with calibration_mode(model), _uncompiled(), torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] = time.perf_counter() - started


@contextmanager
def _naming_what_was_written(pruned: list[PrunedLayer]) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        if pruned:
            text = (
                f"{len(pruned)} layers are already pruned, {pruned[0].name} first and {pruned[-1].name} last; "
                "the others are dense. Load the model again before another try."
            )
            if hasattr(error, "add_note"):  # Python 3.11
                error.add_note(text)
            log.error(text)
        raise
