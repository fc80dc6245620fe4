"""Train the parts of a pruned block to reproduce the outputs of the dense block."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Module

from wanda_lightning.calibration.batches import separable_samples
from wanda_lightning.calibration.lockstep import Call
from wanda_lightning.calibration.pruning_mode import patched
from wanda_lightning.calibration.trees import (
    clone_arguments,
    map_tensors,
    take_out_tensors,
    tensors_of,
)
from wanda_lightning.common.aliases import Forward, Kwargs
from wanda_lightning.common.checks import COUNT, Number, check
from wanda_lightning.common.float64 import widened
from wanda_lightning.models import Layer, Stop, fitting_mask
from wanda_lightning.parallel import Processes
from wanda_lightning.report import TrainedPart
from wanda_lightning.training.masked_weights import MaskedWeights, hold_out
from wanda_lightning.training.predictions import mixed_precision, works
from wanda_lightning.training.recovery import BlockRecovery, Recovery, Trained

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

    trains_blocks = True
    epochs: int = 4
    learning_rate: float = 0.01

    def __post_init__(self) -> None:
        check(self, epochs=COUNT, learning_rate=Number(above=0))

    def start(self, stop: Stop, processes: Processes) -> BlockRecovery:
        """Find the parts of the stop; a stop that is a single layer has no parts."""
        parts = _parts(stop)
        return _BlockReconstruction(self, stop, parts, processes) if parts else BlockRecovery()


@dataclass(frozen=True)
class _Run:
    """One call of a part, or some samples of it."""

    call: Call
    inputs: tuple[tuple[Any, ...], Kwargs]  # its arguments
    output: Tensor  # of the dense part
    keep: Tensor | None  # what is not padding

    def square_sum(self, tokens: Tensor) -> Tensor:
        """Sum the squares over all tokens except padding."""
        if self.keep is not None:
            tokens = tokens.flatten(0, -2)[self.keep.flatten().to(tokens.device)]
        return widened(tokens).square().sum()

    def pieces(self) -> list[_Run]:
        """Return the run in pieces with few samples of the batch; as it is if its rows do not belong to samples."""
        samples = separable_samples(self.call.sample.batch)
        rows = len(self.output) if self.output.ndim > 1 else 0
        if samples <= _SAMPLES or not rows or rows % samples:
            return [self]

        # Pieces of about one size, each with at most `_SAMPLES` samples.
        size = math.ceil(samples / math.ceil(samples / _SAMPLES))

        def piece(start: int, tensor: Tensor) -> Tensor:
            # Vectors stay whole: they may hold positions, equal for all samples.
            if tensor.ndim < 2 or len(tensor) not in (samples, rows):
                return tensor
            per_sample = len(tensor) // samples
            return tensor[start * per_sample : (start + size) * per_sample]

        pieces = []
        for start in range(0, samples, size):
            values = (self.inputs, self.output, self.keep)
            inputs, output, keep = map_tensors(partial(piece, start), values)
            pieces.append(_Run(self.call, inputs, output, keep))
        return pieces


_Runs = Sequence[_Run | None]  # None for a run of another process


@dataclass
class _Part:
    """A module of a block (attention, MLP, or the block itself) with its pruned layers, and one run for each batch."""

    name: str
    module: Module
    layers: tuple[Layer, ...]
    runs: list[_Run] = field(default_factory=list)

    def record(self, call: Call, forward: Forward, /, *args: Any, **kwargs: Any) -> Any:
        """Run the dense part, and copy its inputs, into which it may write, and its output."""
        inputs = clone_arguments((args, kwargs))
        output = forward(*args, **kwargs)
        tensor = _first_output(output).clone()
        mask = fitting_mask(call.sample.masks, self.name, tensor)
        keep = None if mask is None else mask.keep
        self.runs.append(_Run(call, inputs, tensor, keep))
        return output

    def output(self, run: _Run, is_mixed: bool) -> Tensor:
        """Run the part as it is now on the inputs of a run, with gradients if they are enabled."""
        precision = mixed_precision(self.module, is_mixed)
        training = (
            torch.is_grad_enabled()
        )  # `try_out` restores the mode in which the run was recorded

        def forward() -> Tensor:
            with torch.set_grad_enabled(training), precision:
                args, kwargs = clone_arguments(run.inputs)  # a part may write into its inputs
                # Without hooks, as it was recorded.
                return _first_output(self.module.forward(*args, **kwargs))

        return run.call.surroundings.try_out(forward)


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
        first = self.parts[0]
        if first.module is self.stop.module:  # its forward parks the batch
            return first.record(call, call.forward, *args, **kwargs)
        with ExitStack() as patches:
            for part in self.parts:
                recording = partial(part.record, call, part.module.forward)
                patches.enter_context(patched(part.module, "forward", recording))
            return call.forward(*args, **kwargs)

    def train(self, show: Callable[[str], None]) -> Iterator[Trained]:
        """Train part by part; the recorded tensors of a part are freed after its training."""
        while self.parts:
            part = self.parts.pop(0)
            show(part.name)
            trained = _train_part(part, self.config, self.processes)
            if trained:
                yield trained, part.layers


def _train_part(part: _Part, config: Reconstruct, processes: Processes) -> TrainedPart | None:
    """Train for at most `epochs` epochs, as long as the held-out error falls; None if no process has a run.

    All processes share one order of the runs. Each step trains on one run, in the process that recorded it.
    """
    is_mixed = works(
        lambda: not part.runs or part.output(part.runs[0], is_mixed=True) is not None, processes
    )
    splits = works(lambda: _splits_exactly(part, is_mixed), processes)
    trained, held_out = hold_out(_runs_by_batch(part.runs, splits), _HELD_OUT, processes)
    held_out = held_out or trained
    if not held_out:
        return None

    def losses(runs: _Runs, scale: float | None) -> Iterator[float]:
        """Yield the squared error of each run of this process. With a scale, also add its gradients times the scale."""
        for run in filter(None, runs):
            with torch.set_grad_enabled(scale is not None):
                output = part.output(run, is_mixed)
                error = run.square_sum(output - run.output)
            if scale is not None:
                error.backward(torch.full_like(error, scale))
            yield float(error)

    def energies(runs: _Runs, scale: float | None) -> Iterator[float]:
        return (float(run.square_sum(run.output)) for run in filter(None, runs))

    parameters = list(dict.fromkeys(layer.parameter for layer in part.layers))
    passes = [[[run] for run in trained]] * config.epochs
    with MaskedWeights(
        part.module, parameters, part.layers, processes, skip_unreached=True
    ) as weights:
        optimizer = torch.optim.Adam(weights.groups(config.learning_rate))
        results, stopped = weights.fit(optimizer, passes, held_out, losses, stops_early=True)
        # Errors are relative to the outputs of the dense part, which may be zero.
        energy = weights.evaluate(held_out, energies) or torch.finfo(torch.float32).tiny
    before = (results[0].held_out or 0.0) / energy
    after = (results[-1].held_out or 0.0) / energy
    return TrainedPart(part.name, before, after, stopped)


def _runs_by_batch(runs: Sequence[_Run], splits: bool) -> list[list[_Run]]:
    """Return the runs of each batch of this process, in pieces if it `splits` into them."""
    batches: list[list[_Run]] = []
    for run in runs:
        index = run.call.sample.batch_index
        while index >= len(batches):  # some batches may not have reached the part
            batches.append([])
        batches[index] += run.pieces() if splits else [run]
    return batches


def _splits_exactly(part: _Part, is_mixed: bool) -> bool:
    """Return whether the pieces have the outputs of the whole, for one run of each shape."""
    runs = {}
    for run in part.runs:
        tensors = tensors_of((run.inputs, run.output))
        runs[tuple(tensor.shape for tensor in tensors)] = run

    for run in runs.values():
        pieces = run.pieces()
        if len(pieces) == 1:
            continue
        outputs = [part.output(piece, is_mixed) for piece in pieces]
        whole = part.output(run, is_mixed).split([len(output) for output in outputs])
        # Of a sum of squares: less than eps, even in bfloat16.
        rounding = min(2e-4, torch.finfo(outputs[0].dtype).eps)
        for output, expected in zip(outputs, whole, strict=True):
            error = widened(output - expected).square().sum()
            if not error <= rounding * widened(expected).square().sum():  # also if it is NaN
                return False
    return True


def _parts(stop: Stop) -> list[_Part]:
    """Return the children of a block if they hold all its layers, otherwise the block itself; a layer has no parts."""
    block = stop.module
    if block is None or any(layer.module is block for layer in stop.layers):
        return []
    children = [
        _part(name, module, stop.layers) for name, module in _called_children(block, stop.name)
    ]
    if sum(len(child.layers) for child in children) < len(stop.layers):
        return [_part(stop.name, block, stop.layers)]
    return [child for child in children if child.layers]


def _part(name: str, module: Module, layers: Sequence[Layer]) -> _Part:
    """Return a module with those of the layers that are in it."""
    inside = {child for child in module.modules() if child is not module}
    return _Part(name, module, tuple(layer for layer in layers if layer.module in inside))


def _called_children(module: Module, prefix: str) -> Iterator[tuple[str, Module]]:
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
