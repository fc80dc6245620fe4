"""Collect input statistics of all layers of a unit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from wanda_lightning.calibration import pooling
from wanda_lightning.calibration.batches import forward_batch
from wanda_lightning.calibration.error_notes import naming_batch
from wanda_lightning.calibration.interception import Product, input_of, intercept
from wanda_lightning.calibration.lockstep import Call, whole_model_calls
from wanda_lightning.calibration.mode import calibration_mode
from wanda_lightning.calibration.pooling import all_reduce_statistics, merged, pool_experts
from wanda_lightning.calibration.reader import BatchReader, Check, Identity, refuse_nonfinite
from wanda_lightning.calibration.samples import Sample, Samples
from wanda_lightning.calibration.weight_memory import weights_moved
from wanda_lightning.common.errors import UserError
from wanda_lightning.core.statistics import InputStatistics
from wanda_lightning.models import Layer, Unit, token_masks
from wanda_lightning.parallel import SINGLE_PROCESS, Processes, fsdp_calls_checked, gathering_noticed


@dataclass
class Observer:
    """Sums up the inputs of the layers of a unit over the calibration batches of all processes.

    Layers with the same input share one `InputStatistics` object.
    """

    needs: frozenset[str]  # names of the sums
    processes: Processes = SINGLE_PROCESS
    min_expert_tokens: int = 0  # experts with fewer get the statistics of all their siblings in the unit
    # Layers whose statistics include padding, because the masks do not show it in their inputs.
    padding_counted: set[str] = field(default_factory=set)
    # Experts with the statistics of all siblings, each with its own number of tokens.
    pooled: dict[str, int] = field(default_factory=dict)
    not_routed: set[str] = field(default_factory=set)  # experts to which the model passes every token
    _sums: dict[tuple[str, ...], InputStatistics] = field(default_factory=dict)  # by the layers with this input
    _checks: list[Check] = field(default_factory=list)
    # The layers of the last unit, if that was a layer, their inputs in this process, and their statistics over all.
    _last: tuple[Sequence[Layer], list[Identity], dict[str, InputStatistics]] = (), [], {}

    def __call__(self, unit: Unit, calls: Iterable[Call]) -> dict[str, InputStatistics]:
        """Return the statistics of each layer of the unit that a batch reached."""
        if _is_layer(unit):  # it need not run: its input is in the parked calls
            return self._read_parked(unit, [call for call in calls if call.sample.counts])
        self._last = (), [], {}
        with self.processes.fail_together():
            for call in calls:
                with self.collect(unit, call.sample):
                    # A unit runs again after it is pruned, and may write into its inputs.
                    call.run(on_copies=unit.module is not None)
        return self.finish(unit)

    def whole_model(
        self, model: nn.Module, unit: Unit, samples: Samples, tick: Callable[[], None]
    ) -> dict[str, InputStatistics]:
        """Return the statistics of a unit with all layers, from one pass of each sample; `tick` follows each."""
        with fsdp_calls_checked(model, self.processes, weights_moved) as check_calls:
            inputs = self(unit, whole_model_calls(samples, tick))
            check_calls("", 0)
        samples.refuse_if_empty()
        return inputs

    def watched(self, unit: Unit, call: Call) -> Call:
        """Return a call that also reads the inputs of the unit's layers when it runs; `finish` returns the sums."""

        def run(*args: Any, **kwargs: Any) -> Any:
            if not _is_layer(unit):
                with self.collect(unit, call.sample):
                    return call.forward(*args, **kwargs)
            if call.sample.counts:
                self._add(self._read(unit, call.sample, input_of(args, kwargs)))
            return call.forward(*args, **kwargs)

        return replace(call, forward=run)

    @contextmanager
    def collect(self, unit: Unit, sample: Sample) -> Iterator[None]:
        """Read the inputs of the unit's layers while a sample runs in this block."""
        reader = BatchReader(self.needs, sample)
        with intercept(unit.layers if sample.counts else (), reader):
            yield
        self._add(reader)

    def finish(self, unit: Unit) -> dict[str, InputStatistics]:
        """Return the statistics of the batches that ran in `collect`; otherwise the same as `__call__`."""
        sums, checks = self._sums, self._checks
        self._sums, self._checks = {}, []
        with self.processes.fail_together():
            refuse_nonfinite(checks, self.processes)
        by_layer: dict[str, list[InputStatistics]] = {}
        for names, value in sums.items():
            for name in names:
                by_layer.setdefault(name, []).append(value)
        found = {layer.name: by_layer[layer.name] for layer in unit.layers if layer.name in by_layer}
        statistics = {name: parts[0] if len(parts) == 1 else merged(parts) for name, parts in found.items()}
        if self.processes.world_size > 1:
            statistics, padding_counted = all_reduce_statistics(
                unit.layers, statistics, self.padding_counted, self.needs, self.processes
            )
            self.padding_counted |= padding_counted
        result, pooled = pool_experts(unit.layers, statistics, self.min_expert_tokens)
        self.pooled.update(pooled)
        return result

    def _read_parked(self, unit: Unit, calls: Sequence[Call]) -> dict[str, InputStatistics]:
        """Read the inputs of a unit that is a layer from its parked calls, without running it.

        If they are the inputs of the last such unit in all processes, its statistics are returned: q, k and v share one
        sum over the processes, and one factorization.
        """
        with self.processes.fail_together():
            pairs = [(input_of(call.args, call.kwargs), layer) for call in calls for layer in unit.layers]
        layers, identities, statistics = self._last
        same = len(pairs) == len(identities) and len(layers) == len(unit.layers)
        same = same and all(identity.matches(*pair) for identity, pair in zip(identities, pairs, strict=True))
        if self.processes.all_reduce_min(int(same)) and statistics:
            names = {last.name: layer.name for last, layer in zip(layers, unit.layers, strict=True)}
            self.padding_counted.update(names[name] for name in self.padding_counted & names.keys())
            return {names[name]: value for name, value in statistics.items()}
        self._last, identities, statistics = ((), [], {}), [], {}  # frees the Gram matrix before the next one
        with self.processes.fail_together():
            for call in calls:
                x = input_of(call.args, call.kwargs)
                with naming_batch(call.sample.batch_index, x, unit.name):
                    reader = self._read(unit, call.sample, x)
                    if x.dtype != unit.layers[0].parameter.dtype:  # fails without autocast; now, before it is pruned
                        call.run(on_copies=True)
                self._add(reader)
                identities += [entry.identity for entry in reader.entries]
        found = self.finish(unit)
        self._last = unit.layers, identities, found
        return found

    def _read(self, unit: Unit, sample: Sample, x: Tensor) -> BatchReader:
        reader = BatchReader(self.needs, sample)
        for layer in unit.layers:
            reader.read(Product(layer, x))
        return reader

    def _add(self, reader: BatchReader) -> None:
        for entry in reader.entries:
            if entry.padding_counted:
                self.padding_counted.update(entry.layers)
            self._sums.setdefault(tuple(entry.layers), InputStatistics(self.needs)).merge(entry.statistics)
        self._checks += reader.checks
        self.not_routed |= reader.not_routed


def _is_layer(unit: Unit) -> bool:
    """Whether a unit is one layer, or all groups of one convolution."""
    return all(layer.module is unit.module and layer.expert is None for layer in unit.layers)


class PassiveCalibration:
    """Collects statistics of a dense model from forward passes that run anyway, as in a validation loop.

    `unit` holds all layers of the model; see `Observer` for the other arguments.
    """

    def __init__(self, model: nn.Module, unit: Unit, needs: frozenset[str], processes: Processes) -> None:
        self._model, self._unit, self._batches = model, unit, 0
        self.observer = Observer(needs, processes, pooling.MIN_EXPERT_TOKENS)

    @contextmanager
    def collect(self, batch: Any) -> Iterator[None]:
        """Read the inputs of all layers while the batch runs."""
        run = partial(forward_batch, self._model, batch)
        sample = Sample(run, run, batch, token_masks(self._model, batch), batch_index=self._batches)
        self._batches += 1
        noticed = gathering_noticed(self._model, weights_moved)
        with calibration_mode(self._model), noticed, self.observer.collect(self._unit, sample):
            yield

    def finish(self) -> tuple[dict[str, InputStatistics], int]:
        """Return the statistics by layer, and the number of batches of all processes.

        Raises:
            UserError: If there was no batch, or an activation held NaN or infinity.
        """
        statistics = self.observer.finish(self._unit)
        batches = sum(count for (count,) in self.observer.processes.all_gather([self._batches]))
        if not batches:
            raise UserError("calibrate_on='validation' needs batches that run through the model, but none did.")
        return statistics, batches
