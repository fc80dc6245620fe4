"""Collect the statistics of what enters each layer of a unit."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wanda_lightning.calibration.interception import Product, input_of, intercept
from wanda_lightning.calibration.lockstep import Call
from wanda_lightning.calibration.pooling import pool
from wanda_lightning.core.statistics import SUMS, InputStatistics
from wanda_lightning.models import Layer, TokenMask, Unit, fitting_mask
from wanda_lightning.parallel import SINGLE_PROCESS, Processes


@dataclass(frozen=True)
class _Identity:
    """Which tensor this was, without keeping it alive: layers fed the same one (q, k, v) share its statistics."""

    reference: weakref.ref[Tensor]
    version: int
    window: object

    @classmethod
    def of(cls, tensor: Tensor, layer: Layer) -> _Identity:
        return cls(weakref.ref(tensor), _version(tensor), layer.window)

    def is_also(self, tensor: Tensor, layer: Layer) -> bool:
        unchanged = self.reference() is tensor and self.version == _version(tensor)
        return unchanged and self.window == layer.window


class _Largest(NamedTuple):
    """Where the token with the largest number, or one that is none, was in a layer's input.

    Attributes:
        row: Among the tokens that count; it stays on the inputs' device.
        shape: How the tokens lie: samples first, where there is more than one dimension.
        keep: Which of them count; None for all.
    """

    row: Tensor
    shape: tuple[int, ...]
    keep: Tensor | None

    def __str__(self) -> str:
        row = self.row if self.keep is None else self.keep.flatten().nonzero()[int(self.row), 0]
        sample, *place = (int(index) for index in torch.unravel_index(row, self.shape))
        return f"sample {sample}, token {', '.join(map(str, place))}" if place else f"row {sample}"


@dataclass
class _Seen:
    """One tensor of one batch, the layers that it entered, and its sums."""

    identity: _Identity
    layers: list[str]
    statistics: InputStatistics
    largest: _Largest | None
    padding_counted: bool


class _Part(NamedTuple):
    """What one batch brought to some layers: whether it is finite (not looked at yet), and where it is not."""

    layers: list[str]
    batch: int
    finite: Tensor
    largest: _Largest


@dataclass
class Observer:
    """Reads what the calibration batches bring to the layers of a unit.

    Layers with the same input share one `InputStatistics` object, unless several processes add up theirs.

    Args:
        needs: Names of the sums to keep.
        masks: For each batch, its padding; None for a batch that goes through the model but does not count.
        tick: Called after each batch.
        processes: Those that calibrate together; the statistics are of the batches of all.
        min_expert_tokens: Experts that saw fewer tokens get the statistics of all their siblings in the unit.

    Attributes:
        padding_counted: Layers that counted padding, because their inputs do not line up with its mask.
        pooled: Experts with the statistics of all, each with how many tokens it saw itself.
        not_routed: Experts that the model gives every token, so that all counted.
    """

    needs: frozenset[str]
    masks: Sequence[tuple[TokenMask, ...] | None]
    tick: Callable[[], None] = lambda: None
    processes: Processes = SINGLE_PROCESS
    min_expert_tokens: int = 0
    padding_counted: set[str] = field(default_factory=set)
    pooled: dict[str, int] = field(default_factory=dict)
    not_routed: set[str] = field(default_factory=set)
    _last: tuple[list[_Identity], InputStatistics, bool] | None = None
    _shared: dict[tuple[str, ...], InputStatistics] = field(default_factory=dict)
    _parts: list[_Part] = field(default_factory=list)

    def __call__(self, unit: Unit, calls: Iterable[Call]) -> dict[str, InputStatistics]:
        """Statistics for each layer of the unit that a batch reached.

        Raises:
            ValueError: If an input holds NaN or infinity, or its squares overflow; names layer, batch and token.
        """
        with self.processes.fail_together():
            # One, or the groups of one; experts are multiplied inside of their module.
            if all(layer.module is unit.module and layer.expert is None for layer in unit.layers):
                calls = tuple(calls)
                statistics = {layer.name: self._read_parked(layer, calls) for layer in unit.layers}
            else:
                self._run_and_watch(unit, calls)
                statistics = self._watched(unit)
        return self._of_all(unit, statistics)

    @contextmanager
    def watching(self, unit: Unit, batch: int) -> Iterator[None]:
        """Read what enters the layers of a unit while a batch runs."""
        reader = _Reader(self, batch)
        with ExitStack() as hearing:
            if self.masks[batch] is not None:
                reader.rows_of = hearing.enter_context(intercept(unit.layers, reader)).rows_of
            yield
        for entry in reader.seen:
            if entry.largest is not None:
                self._parts.append(_Part(entry.layers, batch, entry.statistics.finite(), entry.largest))
            if entry.padding_counted:
                self.padding_counted.update(entry.layers)
            self._shared.setdefault(tuple(entry.layers), InputStatistics(self.needs)).merge(entry.statistics)
        self.tick()

    def watched(self, unit: Unit) -> dict[str, InputStatistics]:
        """Statistics of the batches that ran in `watching`; as those of a call, errors included."""
        with self.processes.fail_together():
            statistics = self._watched(unit)
        return self._of_all(unit, statistics)

    def _of_all(self, unit: Unit, statistics: Mapping[str, InputStatistics]) -> dict[str, InputStatistics]:
        """The statistics of all processes, where experts that saw few tokens have those of all experts."""
        if self.processes.world_size > 1:
            statistics = self._add_up(unit, statistics)
        result, pooled = pool(unit.layers, statistics, self.min_expert_tokens)
        self.pooled.update(pooled)
        return result

    def _add_up(self, unit: Unit, own: Mapping[str, InputStatistics]) -> dict[str, InputStatistics]:
        """The statistics of all processes; the message has one layout, whatever each process has seen."""
        totals: dict[str, InputStatistics] = {}
        for layer in unit.layers:
            weight = layer.weight
            # The dtype is that of the weight: a process that has seen no input does not know the input's.
            tokens = weight.new_zeros(1, layer.shape[1], dtype=torch.promote_types(weight.dtype, torch.float32))
            totals[layer.name] = total = InputStatistics(self.needs)
            total.sums = {name: SUMS[name](tokens) for name in sorted(self.needs)}
            if layer.name in own:
                total.count = own[layer.name].count
                for name, value in own[layer.name].sums.items():
                    total.sums[name].copy_(value)
        counts = torch.tensor(
            [[totals[layer.name].count, layer.name in self.padding_counted] for layer in unit.layers], dtype=torch.int64
        )
        self.processes.all_reduce_sum([counts, *(value for total in totals.values() for value in total.sums.values())])
        for layer, (count, padding_counted) in zip(unit.layers, counts.tolist(), strict=True):
            totals[layer.name].count = count
            if padding_counted:
                self.padding_counted.add(layer.name)
        return totals

    def _read_parked(self, layer: Layer, calls: Iterable[Call]) -> InputStatistics:
        """The unit is a layer: its input is there already, and nothing runs."""
        calls = tuple(call for call in calls if self.masks[call.batch] is not None)
        inputs = [input_of(call.args, call.kwargs) for call in calls]
        if self._last is not None:
            identities, statistics, padding_counted = self._last
            if len(identities) == len(inputs) and all(
                identity.is_also(x, layer) for identity, x in zip(identities, inputs, strict=True)
            ):
                if padding_counted:
                    self.padding_counted.add(layer.name)
                return statistics
        statistics = InputStatistics(self.needs)
        parts = []
        for call, x in zip(calls, inputs, strict=True):
            part, largest = self._sums(layer, call.batch, x)
            if largest is not None:
                parts.append(_Part([layer.name], call.batch, part.finite(), largest))
            statistics.merge(part)
            self.tick()
        _refuse_nonfinite(parts, self.processes)
        self._last = ([_Identity.of(x, layer) for x in inputs], statistics, layer.name in self.padding_counted)
        return statistics

    def _run_and_watch(self, unit: Unit, calls: Iterable[Call]) -> None:
        writes_into_inputs = unit.module is not None  # it runs twice; until the first call has shown that it does not
        for call in calls:
            with self.watching(unit, call.batch):
                if writes_into_inputs:
                    writes_into_inputs = call.run_on_copies()
                else:
                    call.run()

    def _watched(self, unit: Unit) -> dict[str, InputStatistics]:
        shared, parts = self._shared, self._parts
        self._shared, self._parts = {}, []
        _refuse_nonfinite(parts, self.processes)
        of_layer: dict[str, list[InputStatistics]] = {}
        for names, statistics in shared.items():
            for name in names:
                of_layer.setdefault(name, []).append(statistics)
        return {layer.name: _total(of_layer[layer.name]) for layer in unit.layers if layer.name in of_layer}

    def _sums(self, layer: Layer, batch: int, x: Tensor) -> tuple[InputStatistics, _Largest | None]:
        tokens = layer.tokens(x)
        shape, keep = _places(layer, x, tokens), None
        masks = self.masks[batch]
        if masks and layer.kind.channels > -3:  # no image
            lying = x if layer.kind.channels == -1 else tokens.unflatten(0, shape)
            mask = fitting_mask(masks, layer.name, lying)
            if mask is None:
                self.padding_counted.add(layer.name)
            else:
                shape, keep = tuple(mask.keep.shape), mask.keep
                tokens = tokens[keep.flatten().to(tokens.device)]
        return _summed(self.needs, tokens, shape, keep)


def _summed(
    needs: frozenset[str], tokens: Tensor, shape: tuple[int, ...], keep: Tensor | None
) -> tuple[InputStatistics, _Largest | None]:
    """The sums over the tokens that count, `keep` of those of the shape; and where the largest is."""
    statistics = InputStatistics(needs)
    statistics.update(tokens)
    if not tokens.numel():
        return statistics, None
    # Two reductions are a tenth of the time of the sums; a norm would be a third.
    largest = torch.maximum(tokens.amax(dim=1), -tokens.amin(dim=1)).nan_to_num(nan=torch.inf, posinf=torch.inf)
    return statistics, _Largest(largest.argmax(), shape, keep)


def _places(layer: Layer, x: Tensor, tokens: Tensor) -> tuple[int, ...]:
    if layer.kind.channels < -1:
        samples = len(x) if x.ndim == 1 - layer.kind.channels else 1
        return samples, len(tokens) // samples
    return tuple(x.shape[:-1]) or (1,)


class _Reader:
    """Reads the tokens of each layer while one batch runs."""

    def __init__(self, observer: Observer, batch: int) -> None:
        self.seen: list[_Seen] = []
        self.rows_of: Callable[[Tensor], tuple[Tensor, Tensor] | None] = lambda x: None
        self._observer, self._batch, self._masks = observer, batch, observer.masks[batch] or ()
        self._last: dict[tuple[nn.Module, int | None], Tensor] = {}  # of each expert, which tokens were real

    def __call__(self, products: list[Product], multiply: Callable[[], Tensor]) -> Tensor:
        for product in products:
            if product.first:
                self._read(product)
        if all(product.place is not None and product.tokens.any(dim=-1).all() for product in products):
            self._observer.not_routed.update(product.layer.name for product in products)
        return multiply()

    def _read(self, product: Product) -> None:
        layer, x = product.layer, product.tokens
        for entry in self.seen if layer.expert is None else self.seen[-1:]:  # experts are many, each with its own input
            if entry.identity.is_also(x, layer):
                entry.layers.append(layer.name)
                return
        if layer.expert is None:
            statistics, largest = self._observer._sums(layer, self._batch, x)
        else:
            statistics, largest = self._sums(product)
        counted = layer.name in self._observer.padding_counted
        self.seen.append(_Seen(_Identity.of(x, layer), [layer.name], statistics, largest, counted))

    def _sums(self, product: Product) -> tuple[InputStatistics, _Largest | None]:
        """Those of an expert."""
        layer, x = product.layer, product.tokens
        tokens = layer.tokens(x)
        keep = self._real(layer, x, tokens) if self._masks else None
        if product.place is not None:
            routed = tokens.any(dim=1)  # the tokens of other experts are zeros
            keep = routed if keep is None else routed & keep
        return _summed(self._observer.needs, tokens if keep is None else tokens[keep], (len(tokens),), keep)

    def _real(self, layer: Layer, x: Tensor, tokens: Tensor) -> Tensor | None:
        """Which tokens are no padding: experts are given some of all tokens, so it takes to see which these were."""
        keep = None
        if gathered := self.rows_of(x):
            whole, rows = gathered
            if mask := fitting_mask(self._masks, layer.name, whole):
                keep = mask.keep.flatten().to(rows.device)[rows]
        elif (last := self._last.get((layer.module, layer.expert))) is not None and len(last) == len(tokens):
            keep = last  # what it gives back has the rows of what it was given
        elif mask := fitting_mask(self._masks, layer.name, x):
            keep = mask.keep.flatten().to(tokens.device)
        if keep is None:
            self._observer.padding_counted.add(layer.name)
        else:
            self._last[layer.module, layer.expert] = keep
        return keep


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _total(parts: list[InputStatistics]) -> InputStatistics:
    if len(parts) == 1:
        return parts[0]
    total = InputStatistics(parts[0].needs)
    for part in parts:
        total.merge(part)
    return total


def _refuse_nonfinite(parts: list[_Part], processes: Processes) -> None:
    if not parts or torch.stack([part.finite for part in parts]).all():
        return  # one wait for the device per unit, not one per batch and layer
    bad = next(part for part in parts if not part.finite)
    whose = f" of process {processes.rank}" if processes.world_size > 1 else ""
    raise ValueError(
        f"the input of {', '.join(bad.layers)} holds NaN or infinity, or its squares overflow float32, in calibration "
        f"batch {bad.batch}{whose} (counted from 0), at {bad.largest}. Scores would be meaningless: check that batch, "
        "or load the model in a wider dtype (float32 or bfloat16 rather than float16)."
    )
