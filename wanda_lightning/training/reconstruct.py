"""Train the parts of a pruned block to reproduce the outputs of the dense block."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from wanda_lightning.calibration.batches import separable_samples
from wanda_lightning.calibration.lockstep import Call
from wanda_lightning.calibration.pruning_mode import patched
from wanda_lightning.calibration.trees import (
    clone_arguments,
    map_tensors,
    take_out_tensors,
    tensors_of,
)
from wanda_lightning.common.checks import Number, check
from wanda_lightning.models import Layer, Stop, fitting_mask
from wanda_lightning.parallel import SINGLE_PROCESS, Processes
from wanda_lightning.report import TrainedPart
from wanda_lightning.training.predictions import mixed_precision, widened, works
from wanda_lightning.training.recovery import BlockRecovery, MaskedWeights, Recovery, hold_out

_HELD_OUT = 4  # every fourth step is held out from training
_SAMPLES = 16  # of a batch in a step, at most


@dataclass(frozen=True)
class Reconstruct(Recovery):
    """Train the kept weights of each part of a block to reproduce the outputs of the dense part.

    The attention and the MLP of a block are trained separately, on their inputs in the dense block: Adam minimizes the
    squared error with the mask fixed. A block with layers outside its parts is trained as a whole. Each step takes at
    most 16 samples of a calibration batch, or the whole batch if its pieces would have other outputs. Every fourth
    step, if there are at least four, is held out. Training ends when the held-out error stops falling, and keeps the
    best weights. The inputs and outputs of a block's parts are in memory for all batches while it is trained. Models in
    float32 run in bfloat16 (autocast) where the hardware and the code of the part support it.

    Attributes:
        epochs: Maximum number of passes over the calibration samples.
        learning_rate: Learning rate of Adam, relative to the root mean square of the layer's kept weights.
    """

    trains_blocks: ClassVar = True
    epochs: int = 4
    learning_rate: float = 0.01

    def __post_init__(self) -> None:
        check(self, epochs=Number(minimum=1, whole=True), learning_rate=Number(above=0))

    def start(self, stop: Stop, processes: Processes = SINGLE_PROCESS) -> BlockRecovery:
        """Find the parts of the stop; a stop that is a single layer has no parts."""
        parts = _parts(stop)
        return _BlockReconstruction(self, stop, parts, processes) if parts else BlockRecovery()


class _Run(NamedTuple):
    """One call of a part, or some samples of it: the arguments, the output of the dense part, what is not padding."""

    call: Call
    inputs: tuple[tuple[Any, ...], dict[str, Any]]
    output: Tensor
    keep: Tensor | None


@dataclass
class _Part:
    """A module of a block (attention, MLP, or the block itself) with its pruned layers, and one run for each batch."""

    name: str
    module: nn.Module
    layers: tuple[Layer, ...]
    runs: list[_Run] = field(default_factory=list)

    def record(self, call: Call, forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Run the dense part, and copy its inputs, into which it may write, and its output."""
        inputs = clone_arguments((args, kwargs))
        output = forward(*args, **kwargs)
        found = _first_output(output).clone()
        mask = fitting_mask(call.sample.masks, self.name, found)
        self.runs.append(_Run(call, inputs, found, mask.keep if mask else None))
        return output


@dataclass
class _BlockReconstruction(BlockRecovery):
    """Records the inputs and outputs of the parts of a dense block, and trains the pruned parts on them."""

    config: Reconstruct
    stop: Stop
    parts: list[_Part]
    processes: Processes

    def record(self, calls: Iterable[Call]) -> Iterator[Call]:
        """Record the parts during each call."""
        for call in calls:
            yield replace(call, forward=partial(self._run, call))

    def _run(self, call: Call, /, *args: Any, **kwargs: Any) -> Any:
        if (part := self.parts[0]).module is self.stop.module:  # its forward parks the batch
            return part.record(call, call.forward, *args, **kwargs)
        with ExitStack() as patches:
            for part in self.parts:
                recording = partial(part.record, call, part.module.forward)
                patches.enter_context(patched(part.module, "forward", recording))
            return call.forward(*args, **kwargs)

    def train(self, show: Callable[[str], None]) -> Iterator[tuple[TrainedPart, Sequence[Layer]]]:
        """Train part by part; the recorded tensors of a part are freed after its training."""
        while self.parts:
            part = self.parts.pop(0)
            show(part.name)
            if trained := _PartTraining(part, self.config, self.processes).train():
                yield trained, part.layers


class _PartTraining:
    """Trains the nonzero weights of one part.

    All processes share one order of the runs. Each step trains on one run, in the process that recorded it.
    """

    def __init__(self, part: _Part, config: Reconstruct, processes: Processes) -> None:
        self._part = part
        self._config = config
        self._processes = processes
        self._is_mixed = True
        self._is_mixed = works(
            lambda: not part.runs or self._output(part.runs[0]) is not None, processes
        )
        splits = works(self._splits_exactly, processes)
        by_batch: dict[int, list[_Run]] = {run.call.sample.batch_index: [] for run in part.runs}
        for run in part.runs:
            by_batch[run.call.sample.batch_index] += self._split(run) if splits else [run]
        runs = [by_batch.get(index, []) for index in range(1 + max(by_batch, default=-1))]
        self._trained, held_out = hold_out(runs, _HELD_OUT, processes)
        self._held_out = held_out or self._trained

    def _split(self, run: _Run) -> list[_Run]:
        """Return the run in pieces with few samples of the batch; as it is if its rows do not belong to samples."""
        count = separable_samples(run.call.sample.batch)
        rows = len(run.output) if run.output.ndim > 1 else 0
        values = run.inputs, run.output, run.keep
        # Positions are for all samples, offsets are not.
        vectors = {len(x) for x in tensors_of(values) if x.ndim == 1}
        if count <= _SAMPLES or not rows or rows % count or vectors & {count, count + 1, rows}:
            return [run]
        size = math.ceil(count / math.ceil(count / _SAMPLES))

        def piece(start: int, x: Tensor) -> Tensor:
            if x.ndim < 2 or len(x) not in (count, rows):
                return x
            return x[start * len(x) // count : (start + size) * len(x) // count]

        return [
            _Run(run.call, *map_tensors(partial(piece, start), values))
            for start in range(0, count, size)
        ]

    def _splits_exactly(self) -> bool:
        """Return whether the pieces have the outputs of the whole, for one run of each shape."""
        runs = {
            tuple(x.shape for x in tensors_of((run.inputs, run.output))): run
            for run in self._part.runs
        }
        return all(
            self._is_whole(pieces, run)
            for run in runs.values()
            if len(pieces := self._split(run)) > 1
        )

    def _is_whole(self, pieces: Sequence[_Run], run: _Run) -> bool:
        outputs = [self._output(piece) for piece in pieces]
        expected = self._output(run).split([len(output) for output in outputs])
        # Of a square sum; less than eps, even in bfloat16.
        rounding = min(2e-4, torch.finfo(outputs[0].dtype).eps)
        errors = [
            (widened(one - other), widened(other))
            for one, other in zip(outputs, expected, strict=True)
        ]
        return all(
            bool(error.square().sum() <= rounding * other.square().sum()) for error, other in errors
        )

    def train(self) -> TrainedPart | None:
        """Train for at most `epochs` epochs, as long as the held-out error falls; None if no process has a run."""
        if not self._held_out:
            return None
        part = self._part
        config = self._config
        parameters = list(dict.fromkeys(layer.parameter for layer in part.layers))
        passes = [[[run] for run in self._trained]] * config.epochs
        with MaskedWeights(
            part.module, parameters, part.layers, self._processes, skip_unreached=True
        ) as weights:
            optimizer = torch.optim.Adam(weights.groups(config.learning_rate))
            found, stopped = weights.fit(
                optimizer, passes, self._held_out, self._losses, stops_early=True
            )
            energy = (
                weights.evaluate(self._held_out, self._energies) or torch.finfo(torch.float32).tiny
            )
        before, after = ((each.held_out or 0.0) / energy for each in (found[0], found[-1]))
        return TrainedPart(part.name, before, after, stopped)

    def _losses(self, runs: Sequence[_Run | None], scale: float | None) -> Iterator[float]:
        """Yield the squared error of each run of this process."""
        for run in filter(None, runs):
            with torch.set_grad_enabled(scale is not None):
                error = self._square_sum(self._output(run, scale is not None) - run.output, run)
            if scale is not None:
                error.backward(torch.full_like(error, scale))
            yield float(error)

    def _energies(self, runs: Sequence[_Run | None], _: float | None) -> Iterator[float]:
        return (float(self._square_sum(run.output, run)) for run in filter(None, runs))

    def _output(self, run: _Run, training: bool = False) -> Tensor:
        part = self._part.module
        precision = mixed_precision(part, self._is_mixed)

        def forward() -> Tensor:
            with torch.set_grad_enabled(training), precision:
                args, kwargs = clone_arguments(run.inputs)  # a part may write into its inputs
                # Without hooks, as it was recorded.
                return _first_output(part.forward(*args, **kwargs))

        return run.call.surroundings.try_out(forward)

    def _square_sum(self, x: Tensor, run: _Run) -> Tensor:
        """Sum the squares over all tokens except padding."""
        if run.keep is not None:
            x = x.flatten(0, -2)[run.keep.flatten().to(x.device)]
        return widened(x).square().sum()


def _parts(stop: Stop) -> list[_Part]:
    """Return the children of a block if they hold all its layers, otherwise the block itself; a layer has no parts."""
    if (
        stop.module is None
        or not stop.layers
        or any(layer.module is stop.module for layer in stop.layers)
    ):
        return []
    parts = []
    for name, module in [*_called_children(stop.module, stop.name), (stop.name, stop.module)]:
        inside = {child for child in module.modules() if child is not module}
        if layers := tuple(layer for layer in stop.layers if layer.module in inside):
            parts.append(_Part(name, module, layers))
    *children, block = parts
    return children if sum(len(part.layers) for part in children) >= len(stop.layers) else [block]


def _called_children(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the children of a module, with the members of a list or dictionary in place of the container."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _called_children(child, f"{prefix}.{name}")
        else:
            yield f"{prefix}.{name}", child


def _first_output(output: object) -> Tensor:
    """Return the first floating-point tensor in the output of a part."""
    tensors, _ = take_out_tensors(output)
    return next(tensor for tensor in tensors if tensor.is_floating_point())
