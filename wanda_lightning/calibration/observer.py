"""Collect input statistics of all layers of a unit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from wanda_lightning.calibration.batch_thread import Call
from wanda_lightning.calibration.error_notes import naming_batch
from wanda_lightning.calibration.interception import Product, input_of, intercept
from wanda_lightning.calibration.mode import calibration_mode
from wanda_lightning.calibration.nonfinite import Check, refuse_nonfinite
from wanda_lightning.calibration.pooling import all_reduce_statistics, merged, pool_experts
from wanda_lightning.calibration.reader import BatchReader, Identity
from wanda_lightning.common.errors import UserError
from wanda_lightning.core.statistics import InputStatistics
from wanda_lightning.models import Layer, TokenMask, Unit, token_masks
from wanda_lightning.parallel import SINGLE_PROCESS, Processes


@dataclass
class Observer:
    """Sums up the inputs of the layers of a unit over all calibration batches.

    Layers with the same input share one `InputStatistics` object.

    Args:
        needs: Names of the sums.
        masks: The padding of each batch; None for a batch that runs through the model but does not count.
        tick: Called after each batch.
        processes: Processes that calibrate together; the statistics are sums over the batches of all processes.
        min_expert_tokens: Experts with fewer tokens get the statistics of all their siblings in the unit.

    Attributes:
        padding_counted: Layers whose statistics include padding, because the masks do not show it in their inputs.
        pooled: Experts with the statistics of all siblings, each with its own number of tokens.
        not_routed: Experts to which the model passes every token, so that all tokens count.
    """

    needs: frozenset[str]
    masks: Sequence[tuple[TokenMask, ...] | None]
    tick: Callable[[], None] = lambda: None
    processes: Processes = SINGLE_PROCESS
    min_expert_tokens: int = 0
    padding_counted: set[str] = field(default_factory=set)
    pooled: dict[str, int] = field(default_factory=dict)
    not_routed: set[str] = field(default_factory=set)
    _sums: dict[tuple[str, ...], InputStatistics] = field(default_factory=dict)  # by the layers with this input
    _checks: list[Check] = field(default_factory=list)
    # The last unit that was a layer: its layers, their inputs in all batches, and their statistics.
    _last: tuple[Sequence[Layer], list[Identity], dict[str, InputStatistics]] = (), [], {}

    def __call__(self, unit: Unit, calls: Iterable[Call]) -> dict[str, InputStatistics]:
        """Return the statistics of each layer of the unit that a batch reached.

        Raises:
            ValueError: If an input holds NaN or infinity, or its squares overflow; names layer, batch and token.
        """
        with self.processes.fail_together():
            if _is_layer(unit):  # it need not run: its input is in the parked calls
                statistics = self._read_parked(unit, calls)
            else:
                for call in calls:
                    with self.collect(unit, call.batch):
                        # A unit runs again after it is pruned, and may write into its inputs.
                        call.run(on_copies=unit.module is not None)
                    call.parking.offload()
                statistics = self._take(unit)
        return self._of_all(unit, statistics)

    def watched(self, unit: Unit, call: Call) -> Call:
        """Return a call that also reads the inputs of the unit's layers when it runs; `finish` returns the sums."""
        return replace(call, forward=partial(self._run_watched, unit, call))

    def _run_watched(self, unit: Unit, call: Call, *args: Any, **kwargs: Any) -> Any:
        if not _is_layer(unit):
            with self.collect(unit, call.batch):
                return call.forward(*args, **kwargs)
        if self.masks[call.batch] is not None:
            self._add(self._read(unit, call.batch, input_of(args, kwargs)))
        return call.forward(*args, **kwargs)

    @contextmanager
    def collect(self, unit: Unit, batch: int) -> Iterator[None]:
        """Read the inputs of the unit's layers while a batch runs in this block."""
        reader = self._reader(batch)
        with intercept(() if self.masks[batch] is None else unit.layers, reader):
            yield
        self._add(reader)
        self.tick()

    def finish(self, unit: Unit) -> dict[str, InputStatistics]:
        """Return the statistics of the batches that ran in `collect`; otherwise the same as `__call__`."""
        with self.processes.fail_together():
            statistics = self._take(unit)
        return self._of_all(unit, statistics)

    def _read_parked(self, unit: Unit, calls: Iterable[Call]) -> dict[str, InputStatistics]:
        """Read the inputs of a unit that is a layer from its parked calls, without running it."""
        calls = [call for call in calls if self.masks[call.batch] is not None]
        inputs = [input_of(call.args, call.kwargs) for call in calls]
        layers, identities, statistics = self._last
        pairs = [(x, layer) for x in inputs for layer in unit.layers]
        if (
            pairs
            and len(pairs) == len(identities)
            and all(identity.matches(*pair) for identity, pair in zip(identities, pairs, strict=True))
        ):
            names = {last.name: layer.name for last, layer in zip(layers, unit.layers, strict=True)}
            self.padding_counted.update(names[name] for name in self.padding_counted & names.keys())
            return {names[name]: value for name, value in statistics.items()}
        identities = []
        for call, x in zip(calls, inputs, strict=True):
            call.parking.restore()
            with naming_batch(call.batch, x, unit.name):
                reader = self._read(unit, call.batch, x)
            call.parking.offload()
            self._add(reader)
            identities += [entry.identity for entry in reader.entries]
        statistics = self._take(unit)
        self._last = unit.layers, identities, statistics
        return statistics

    def _read(self, unit: Unit, batch: int, x: Tensor) -> BatchReader:
        """Read the input of a unit that is a layer."""
        reader = self._reader(batch)
        for layer in unit.layers:
            reader.read(Product(layer, x))
        return reader

    def _reader(self, batch: int) -> BatchReader:
        return BatchReader(self.needs, batch, self.masks[batch] or ())

    def _add(self, reader: BatchReader) -> None:
        """Add the sums and the checks of one batch."""
        for entry in reader.entries:
            if entry.padding_counted:
                self.padding_counted.update(entry.layers)
            self._sums.setdefault(tuple(entry.layers), InputStatistics(self.needs)).merge(entry.statistics)
        self._checks += reader.checks
        self.not_routed |= reader.not_routed

    def _take(self, unit: Unit) -> dict[str, InputStatistics]:
        """Return the sums of this process for each layer, and reset them."""
        sums, checks = self._sums, self._checks
        self._sums, self._checks = {}, []
        refuse_nonfinite(checks, self.processes)
        by_layer: dict[str, list[InputStatistics]] = {}
        for names, statistics in sums.items():
            for name in names:
                by_layer.setdefault(name, []).append(statistics)
        return {
            layer.name: parts[0] if len(parts) == 1 else merged(parts)
            for layer in unit.layers
            if (parts := by_layer.get(layer.name))
        }

    def _of_all(self, unit: Unit, statistics: Mapping[str, InputStatistics]) -> dict[str, InputStatistics]:
        """Sum the statistics over all processes, and pool the statistics of experts with few tokens."""
        if self.processes.world_size > 1:
            statistics, padding_counted = all_reduce_statistics(
                unit.layers, statistics, self.padding_counted, self.needs, self.processes
            )
            self.padding_counted |= padding_counted
        result, pooled = pool_experts(unit.layers, statistics, self.min_expert_tokens)
        self.pooled.update(pooled)
        return result


def _is_layer(unit: Unit) -> bool:
    """Whether a unit is one layer, or all groups of one convolution."""
    return all(layer.module is unit.module and layer.expert is None for layer in unit.layers)


class PassiveCalibration:
    """Collects statistics of a dense model from forward passes that run anyway, as in a validation loop.

    `unit` holds all layers of the model; see `Observer` for the other arguments.
    """

    def __init__(
        self, model: nn.Module, unit: Unit, needs: frozenset[str], min_expert_tokens: int, processes: Processes
    ) -> None:
        self._model, self._unit = model, unit
        self._masks: list[tuple[TokenMask, ...] | None] = []
        self.observer = Observer(needs, self._masks, processes=processes, min_expert_tokens=min_expert_tokens)

    @contextmanager
    def collect(self, batch: Any) -> Iterator[None]:
        """Read the inputs of all layers while the batch runs."""
        self._masks.append(token_masks(self._model, batch))
        with calibration_mode(self._model), self.observer.collect(self._unit, len(self._masks) - 1):
            yield

    def finish(self) -> tuple[dict[str, InputStatistics], int]:
        """Return the statistics by layer, and the number of batches of all processes.

        Raises:
            ValueError: If there was no batch, or an activation held NaN or infinity.
        """
        statistics = self.observer.finish(self._unit)
        batches = torch.tensor(len(self._masks))
        self.observer.processes.all_reduce_sum([batches])
        if not batches:
            raise UserError("calibrate_on='validation' needs batches that run through the model, but none did.")
        return statistics, int(batches)
