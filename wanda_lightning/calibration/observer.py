"""Collect input statistics of all layers of a stop."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import Module

from wanda_lightning.calibration.error_notes import naming_batch
from wanda_lightning.calibration.interception import Multiply, Product, input_of, intercept
from wanda_lightning.calibration.lockstep import Call, whole_model_calls
from wanda_lightning.calibration.pruning_mode import calibration_mode
from wanda_lightning.calibration.samples import Sample, Samples, forward_batch
from wanda_lightning.calibration.surroundings import refuse_transforms
from wanda_lightning.calibration.torch_internals import is_mapped, write_count
from wanda_lightning.common.aliases import Action
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.grouping import grouped
from wanda_lightning.core.statistics import Inputs, InputStatistics
from wanda_lightning.models import Layer, Stop, fitting_mask, token_masks
from wanda_lightning.parallel import SINGLE_PROCESS, Processes, all_reduce_statistics


@dataclass(frozen=True)
class Observation:
    """The inputs of some layers, summed over their tokens. The keys are names of layers."""

    # One object is shared by layers with the same input.
    inputs: Inputs = field(default_factory=dict)
    # Layers whose statistics include padding, since no mask shows it in their inputs.
    padding_counted: Set[str] = frozenset()
    # Experts that got the statistics of all siblings, each with its own number of tokens.
    pooled: Mapping[str, int] = field(default_factory=dict)


class StopObserver(ABC):
    """Measures what a removal needs while samples run."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes

    def __call__(self, stop: Stop, calls: Iterable[Call]) -> Observation:
        """Run the calls that wait at a stop, on copies, and return what they show."""
        with self.processes.fail_together():
            for call in calls:
                with self.collect(stop, call.sample):
                    # The module runs again after it is pruned, and may write into its inputs.
                    call.run(on_copies=stop.module is not None)
        return self.finish(stop)

    def whole_model(self, stop: Stop, samples: Samples, tick: Action) -> Observation:
        """Run all samples through the model as one stop, and return what they show; `tick` follows each."""
        observation = self(stop, whole_model_calls(samples, tick))
        samples.refuse_if_empty()
        return observation

    def watched(self, stop: Stop, call: Call) -> Call:
        """Return a call that also measures when it runs; `finish` returns what it shows."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.collect(stop, call.sample):
                return call.forward(*args, **kwargs)

        return replace(call, forward=run)

    @abstractmethod
    def collect(self, stop: Stop, sample: Sample) -> AbstractContextManager[None]:
        """Measure while a sample runs in this block."""

    @abstractmethod
    def finish(self, stop: Stop) -> Observation:
        """Return what `collect` has measured at a stop, over all processes; call it once for each stop."""


class Observer(StopObserver):
    """Sums up the inputs of the layers of a stop over the calibration batches of all processes.

    `needs` holds the names of the sums.
    """

    def __init__(self, needs: frozenset[str], processes: Processes = SINGLE_PROCESS) -> None:
        super().__init__(processes)
        self.needs = needs
        self._readings = _Readings()
        self._last_layer = _LayerObservation()

    def __call__(self, stop: Stop, calls: Iterable[Call]) -> Observation:
        """Return what entered each layer of the stop that a batch reached."""
        if _is_layer(stop):  # it need not run: its input is in the parked calls
            return self._read_parked(stop, list(calls))
        self._last_layer = _LayerObservation()
        return super().__call__(stop, calls)

    def watched(self, stop: Stop, call: Call) -> Call:
        """Return a call that also reads the inputs of the stop's layers when it runs; `finish` returns the sums."""
        if not _is_layer(stop):
            return super().watched(stop, call)

        def run(*args: Any, **kwargs: Any) -> Any:
            self._readings.add(self._read(stop, call.sample, input_of(args, kwargs)))
            return call.forward(*args, **kwargs)

        return replace(call, forward=run)

    @contextmanager
    def collect(self, stop: Stop, sample: Sample) -> Iterator[None]:
        """Read the inputs of the stop's layers while a sample runs in this block."""
        inputs = BatchInputs(self.needs, sample)
        with intercept(stop.layers, inputs):
            yield
        # Not if the sample fails: its sums would be those of a part of the model.
        self._readings.add(inputs)

    def finish(self, stop: Stop) -> Observation:
        """Return what the batches that ran in `collect` show; otherwise the same as `__call__`."""
        readings = self._readings
        self._readings = _Readings()
        with self.processes.fail_together():
            readings.refuse_nonfinite(self.processes)

        statistics = readings.by_layer(stop.layers)
        padded = readings.padded
        if self.processes.world_size > 1:
            # From the weight: a process whose batches did not reach a layer does not know the dtype of its input.
            tokens = {
                layer.name: layer.weight.new_zeros(1, layer.shape[1]) for layer in stop.layers
            }
            statistics, padded = all_reduce_statistics(
                tokens, statistics, padded, self.needs, self.processes
            )
        return pool_experts(stop.layers, statistics, padded)

    def _read_parked(self, stop: Stop, calls: Sequence[Call]) -> Observation:
        """Read the inputs of a stop that is a layer from its parked calls, without running it.

        If they are the inputs of the last such stop in all processes, its statistics are returned: q, k and v share one
        sum over the processes, and one factorization.
        """
        inputs = [input_of(call.args, call.kwargs) for call in calls]
        last = self._last_layer
        has_same = last.has_inputs(stop.layers, inputs)
        if self.processes.all_agree(has_same) and last.observation.inputs:
            return last.observation_of(stop.layers[0])

        # Frees the Gram matrix before the next one.
        self._last_layer = last = _LayerObservation()
        identities = []
        with self.processes.fail_together():
            for call, tokens in zip(calls, inputs, strict=True):
                with naming_batch(call.sample.batch_index, tokens, stop.name):
                    batch_inputs = self._read(stop, call.sample, tokens)
                    # Fails without autocast; now, before it is pruned.
                    if tokens.dtype != stop.layers[0].parameter.dtype:
                        call.run(on_copies=True)
                    self._readings.add(batch_inputs)
                identities += [entry.identity for entry in batch_inputs.entries]
        observation = self.finish(stop)
        if len(stop.layers) == 1:
            self._last_layer = _LayerObservation(identities, observation)
        return observation

    def _read(self, stop: Stop, sample: Sample, tokens: Tensor) -> BatchInputs:
        inputs = BatchInputs(self.needs, sample)
        for layer in stop.layers:
            inputs.read(Product(layer, tokens))
        return inputs


@dataclass(frozen=True)
class _LayerObservation:
    """The observation at the last stop, if that was one layer; otherwise it is empty."""

    identities: Sequence[Identity] = ()  # of the inputs in this process, by batch
    observation: Observation = Observation()

    def has_inputs(self, layers: Sequence[Layer], inputs: Sequence[Tensor]) -> bool:
        """Whether the layer of another stop has the same inputs, one for each batch."""
        if len(layers) > 1 or len(inputs) != len(self.identities):
            return False
        return all(
            identity.matches(tokens, layers[0])
            for identity, tokens in zip(self.identities, inputs, strict=True)
        )

    def observation_of(self, layer: Layer) -> Observation:
        """Return the same observation for a layer with another name."""
        (statistics,) = self.observation.inputs.values()
        padding_counted = {layer.name} if self.observation.padding_counted else set()
        return Observation({layer.name: statistics}, padding_counted)


class _FiniteCheck(NamedTuple):
    """Whether the sums over one input of one batch are finite, which is read later: that waits for the device."""

    is_finite: Tensor
    layers: Sequence[str]
    batch: int


@dataclass
class _Readings:
    """Sums over the batches that have run since the last observation."""

    # By the layers with this input.
    sums: dict[tuple[str, ...], InputStatistics] = field(default_factory=dict)
    padded: set[str] = field(default_factory=set)  # layers whose sums may include padding
    checks: list[_FiniteCheck] = field(default_factory=list)

    def add(self, inputs: BatchInputs) -> None:
        """Add what a batch has shown."""
        for entry in inputs.entries:
            if entry.padding_counted:
                self.padded.update(entry.layers)
            empty = InputStatistics(entry.statistics.needs)
            self.sums.setdefault(tuple(entry.layers), empty).merge(entry.statistics)
            if entry.statistics.count:
                is_finite = entry.statistics.finite()
                self.checks.append(_FiniteCheck(is_finite, entry.layers, inputs.batch))

    def by_layer(self, layers: Sequence[Layer]) -> dict[str, InputStatistics]:
        """Return the sums of each layer that a batch has reached; layers with the same inputs share an object."""
        parts: dict[str, list[InputStatistics]] = {}
        for names, statistics in self.sums.items():
            for name in names:
                parts.setdefault(name, []).append(statistics)

        merged = {}
        for layer in layers:
            found = parts.get(layer.name, [])
            if len(found) == 1:
                merged[layer.name] = found[0]
            elif found:
                merged[layer.name] = InputStatistics.merged(found)
        return merged

    def refuse_nonfinite(self, processes: Processes) -> None:
        """Read all checks, and refuse sums that are not finite."""
        failed = next((check for check in self.checks if not check.is_finite), None)
        if failed is None:
            return
        process = f" of process {processes.rank}" if processes.world_size > 1 else ""
        raise UserError(
            f"calibration batches must give finite activations, but the input of {', '.join(failed.layers)} holds NaN "
            f"or infinity, or its squares overflow float32, in calibration batch {failed.batch}{process} (counted from "
            "0). Check that batch, or load the model in a wider dtype (float32 or bfloat16 rather than float16)."
        )


def _is_layer(stop: Stop) -> bool:
    """Whether a stop is one layer, or all groups of one convolution."""
    return all(layer.module is stop.module and layer.expert is None for layer in stop.layers)


class PassiveCalibration:
    """Collects statistics of a dense model from forward passes that run anyway, as in a validation loop.

    `stop` holds all layers of the model; see `Observer` for the other arguments.
    """

    def __init__(
        self, model: Module, stop: Stop, needs: frozenset[str], processes: Processes
    ) -> None:
        self._model = model
        self._stop = stop
        self._batches = 0
        self.observer = Observer(needs, processes)

    @contextmanager
    def collect(self, batch: Any) -> Iterator[None]:
        """Read the inputs of all layers while the batch runs."""
        run = partial(forward_batch, self._model, batch)
        sample = Sample(run, run, batch, token_masks(self._model, batch), batch_index=self._batches)
        self._batches += 1
        with calibration_mode(self._model), self.observer.collect(self._stop, sample):
            yield

    def finish(self) -> tuple[Observation, int]:
        """Return what the batches have shown, and the number of batches of all processes; there must be one."""
        observation = self.observer.finish(self._stop)
        batches = sum(count for (count,) in self.observer.processes.all_gather([self._batches]))
        if not batches:
            raise UserError(
                "calibrate_on='validation' needs batches that run through the model, but none did."
            )
        return observation, batches


class Identity:
    """Identifies an input without keeping it alive, so that layers with the same input (q, k, v) share statistics."""

    def __init__(self, tokens: Tensor, layer: Layer, call: int = 0) -> None:
        self._reference = weakref.ref(tokens)
        self._version = _version(tokens, call)
        self._window = layer.window

    def matches(self, tokens: Tensor, layer: Layer, call: int = 0) -> bool:
        """Whether a layer's input is the same tensor, unmodified, with the same tokens.

        A tensor of inference mode has no version that would show a modification, so it only matches in the same call.
        """
        return (
            self._reference() is tokens
            and self._version == _version(tokens, call)
            and self._window == layer.window
        )


def _version(tensor: Tensor, call: int) -> int:
    return -1 - call if tensor.is_inference() else write_count(tensor)


class Entry(NamedTuple):
    """One input of one batch."""

    identity: Identity
    layers: list[str]  # names of the layers with this input
    statistics: InputStatistics  # sums over its tokens, except padding
    padding_counted: bool  # whether the batch may have padding that could not be left out


class BatchInputs:
    """Reads the tokens of each layer while one batch runs; called in place of each product."""

    def __init__(self, needs: frozenset[str], sample: Sample) -> None:
        self.entries: list[Entry] = []  # one for each distinct input
        self.batch = sample.batch_index
        self._needs = needs
        self._masks = sample.masks
        self._calls = 0

    def __call__(self, products: list[Product], multiply: Multiply) -> Tensor:
        """Read the tokens of the products, and return the result of the multiplication."""
        self._calls += 1
        for product in products:
            if product.row == 0:  # every piece has the same tokens
                self.read(product)
        return multiply()

    def read(self, product: Product) -> None:
        """Sum the tokens of a product, unless another layer had the same input."""
        layer = product.layer
        if is_mapped(product.tokens):
            refuse_transforms(layer.name)
        # A search through the entries of many experts is slow, and only the latest entry can match.
        candidates = self.entries if layer.expert is None else self.entries[-1:]
        for entry in candidates:
            if entry.identity.matches(product.tokens, layer, self._calls):
                entry.layers.append(layer.name)
                return

        has_padding = bool(self._masks) and layer.kind.channels > -3  # images have no padding
        if layer.kind.channels < -1 and not has_padding:
            self._read_images(layer, product.tokens)
        else:
            self._read_tokens(product, has_padding)

    def _read_images(self, layer: Layer, images: Tensor) -> None:
        """Sum the tokens of a convolution, all of which count, without forming all of them at once."""
        statistics = self._entry(layer, images, padding_counted=False)
        batch = images.detach()
        if not _has_samples(layer, images):
            batch = batch.unsqueeze(0)
        if self._needs == {"square_sum"}:
            squares = layer.squares(batch)
            statistics.add(len(batch) * len(squares), {"square_sum": squares.sum(dim=0)})
        else:
            for tokens in layer.token_chunks(batch):
                statistics.update(tokens)

    def _read_tokens(self, product: Product, has_padding: bool) -> None:
        """Sum the tokens of a product, without padding and without the tokens of other experts."""
        layer = product.layer
        tokens = layer.tokens(product.tokens)
        # An expert gets some of the tokens, in an order of its own, or a copy of all of them.
        in_order = layer.expert is None or product.slot is not None
        keep = None
        if has_padding and in_order:
            keep = self._real_tokens(layer, product.tokens, tokens)
        padding_counted = has_padding and keep is None

        if product.slot is not None:
            routed = tokens.any(dim=1)  # tokens of other experts are zeros
            keep = routed if keep is None else routed & keep
        if keep is not None:
            tokens = tokens[keep]
        self._entry(layer, product.tokens, padding_counted).update(tokens)

    def _entry(self, layer: Layer, tokens: Tensor, padding_counted: bool) -> InputStatistics:
        """Add an entry for an input, and return its statistics, which are empty."""
        identity = Identity(tokens, layer, self._calls)
        statistics = InputStatistics(self._needs)
        self.entries.append(Entry(identity, [layer.name], statistics, padding_counted))
        return statistics

    def _real_tokens(self, layer: Layer, inputs: Tensor, tokens: Tensor) -> Tensor | None:
        """Return which tokens are not padding; None if that is unknown."""
        by_sample = inputs
        if layer.kind.channels != -1:
            samples = len(inputs) if _has_samples(layer, inputs) else 1
            by_sample = tokens.unflatten(0, (samples, -1))
        mask = fitting_mask(self._masks, layer.name, by_sample)
        return mask.keep.flatten().to(tokens.device) if mask else None


def _has_samples(layer: Layer, inputs: Tensor) -> bool:
    """Whether an input of a convolution has a dimension of samples, before those of channels and positions."""
    return inputs.ndim == 1 - layer.kind.channels


MIN_EXPERT_TOKENS = 32  # a norm over n Gaussian inputs has a relative error of 0.7 / sqrt(n)


def pool_experts(layers: Sequence[Layer], statistics: Inputs, padded: Set[str]) -> Observation:
    """Replace the statistics of each expert with too few tokens, or none, with the sum over its siblings in this stop.

    `padded` are the layers whose statistics include padding.
    """
    replaced = dict(statistics)
    pooled = {}
    experts = [layer for layer in layers if layer.siblings]
    for family in grouped(experts, attrgetter("siblings")).values():
        names = [layer.name for layer in family]
        counts = {name: statistics[name].count if name in statistics else 0 for name in names}
        enough = min(MIN_EXPERT_TOKENS, sum(counts.values()))
        few = {name: count for name, count in counts.items() if count < enough}
        if few:
            reached = [statistics[name] for name, count in counts.items() if count]
            replaced.update(dict.fromkeys(few, InputStatistics.merged(reached)))
            pooled.update(few)
    return Observation(replaced, padded, pooled)
