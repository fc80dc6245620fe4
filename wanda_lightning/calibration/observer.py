"""Collect input statistics of all layers of a unit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from wanda_lightning.calibration.batch_thread import Call
from wanda_lightning.calibration.error_notes import naming_batch
from wanda_lightning.calibration.interception import input_of, intercept
from wanda_lightning.calibration.nonfinite import Check, refuse_nonfinite
from wanda_lightning.calibration.pooling import merged, pool
from wanda_lightning.calibration.reader import BatchReader, Identity
from wanda_lightning.calibration.reduction import all_reduce_statistics
from wanda_lightning.core.statistics import InputStatistics
from wanda_lightning.models import Layer, TokenMask, Unit
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
    _last: tuple[list[Identity], InputStatistics, bool] | None = None
    _sums: dict[tuple[str, ...], InputStatistics] = field(default_factory=dict)  # by the layers with this input
    _checks: list[Check] = field(default_factory=list)

    def __call__(self, unit: Unit, calls: Iterable[Call]) -> dict[str, InputStatistics]:
        """Return the statistics of each layer of the unit that a batch reached.

        Raises:
            ValueError: If an input holds NaN or infinity, or its squares overflow; names layer, batch and token.
        """
        with self.processes.fail_together():
            # A unit that is a layer, or all groups of a convolution, need not run: its input is in the parked calls.
            if all(layer.module is unit.module and layer.expert is None for layer in unit.layers):
                calls = tuple(calls)
                statistics = {layer.name: self._read_parked(layer, calls) for layer in unit.layers}
            else:
                for call in calls:
                    with self.collect(unit, call.batch):
                        if unit.module is None:
                            call.run()
                        else:  # the unit may write into its inputs, and runs again after it is pruned
                            call.run_on_copies()
                statistics = self._take(unit)
        return self._of_all(unit, statistics)

    @contextmanager
    def collect(self, unit: Unit, batch: int) -> Iterator[None]:
        """Read the inputs of the unit's layers while a batch runs in this block."""
        masks = self.masks[batch]
        reader = BatchReader(self.needs, masks or ())
        with intercept(() if masks is None else unit.layers, reader) as interceptor:
            reader.rows_of = interceptor.rows_of
            yield
        for entry in reader.entries:
            self._checks.extend(entry.checks(batch))
            if entry.padding_counted:
                self.padding_counted.update(entry.layers)
            self._sums.setdefault(tuple(entry.layers), InputStatistics(self.needs)).merge(entry.statistics)
        self.not_routed |= reader.not_routed
        self.tick()

    def finish(self, unit: Unit) -> dict[str, InputStatistics]:
        """Return the statistics of the batches that ran in `collect`; otherwise the same as `__call__`."""
        with self.processes.fail_together():
            statistics = self._take(unit)
        return self._of_all(unit, statistics)

    def _of_all(self, unit: Unit, statistics: Mapping[str, InputStatistics]) -> dict[str, InputStatistics]:
        """Sum the statistics over all processes, and pool the statistics of experts with few tokens."""
        if self.processes.world_size > 1:
            statistics, padding_counted = all_reduce_statistics(
                unit.layers, statistics, self.padding_counted, self.needs, self.processes
            )
            self.padding_counted |= padding_counted
        result, pooled = pool(unit.layers, statistics, self.min_expert_tokens)
        self.pooled.update(pooled)
        return result

    def _read_parked(self, layer: Layer, calls: Iterable[Call]) -> InputStatistics:
        """Read the inputs of a unit that is a layer from its parked calls, without running it."""
        calls = [call for call in calls if self.masks[call.batch] is not None]
        inputs = [input_of(call.args, call.kwargs) for call in calls]
        if self._last is not None:
            identities, statistics, padding_counted = self._last
            if len(identities) == len(inputs) and all(
                identity.matches(x, layer) for identity, x in zip(identities, inputs, strict=True)
            ):
                if padding_counted:
                    self.padding_counted.add(layer.name)
                return statistics
        statistics = InputStatistics(self.needs)
        checks: list[Check] = []
        identities, padding_counted = [], False
        for call, x in zip(calls, inputs, strict=True):
            with naming_batch(call.batch, x):
                entry = BatchReader(self.needs, self.masks[call.batch] or ()).read(layer, x)
            checks.extend(entry.checks(call.batch))
            statistics.merge(entry.statistics)
            identities.append(entry.identity)
            padding_counted |= entry.padding_counted
            self.tick()
        refuse_nonfinite(checks, self.processes)
        if padding_counted:
            self.padding_counted.add(layer.name)
        self._last = identities, statistics, padding_counted
        return statistics

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
