"""Train the parts of a pruned block to reproduce the outputs of the dense block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from wanda_lightning.calibration.batch_thread import Call
from wanda_lightning.calibration.cloning import clone_arguments
from wanda_lightning.calibration.gradients import without_gradients
from wanda_lightning.common.checks import Number, check
from wanda_lightning.common.errors import UserError
from wanda_lightning.core.masking import masked
from wanda_lightning.models import Layer, TokenMask, Unit, fitting_mask
from wanda_lightning.training.masked_weights import keep_mask, root_mean_square
from wanda_lightning.training.predictions import widened
from wanda_lightning.training.recovery import RecoveredPart, Recovery, UnitRecovery

_HELD_OUT = 4  # every fourth batch is held out from training

TokenMasks = Sequence[tuple[TokenMask, ...] | None]  # one entry for each batch


@dataclass(frozen=True)
class Reconstruct(Recovery):
    """Train the kept weights of each part of a block to reproduce the outputs of the dense part.

    The attention and the MLP of a block are trained separately, on their inputs in the dense block: Adam minimizes the
    squared error with the mask fixed. Every fourth calibration batch, if there are at least four, is held out. Training
    ends when the error on the held-out batches stops falling, and keeps the best weights. A block with layers outside
    its parts is trained as a whole. While a block is trained, the inputs and outputs of its parts are in memory for
    all batches.

    Attributes:
        epochs: Maximum number of passes over the calibration batches.
        learning_rate: Learning rate of Adam, relative to the root mean square of the layer's kept weights.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"square_sum"})
    recorded: ClassVar[int] = 4  # the inputs and outputs of attention and MLP
    sequential: ClassVar[str] = "block"
    epochs: int = 4
    learning_rate: float = 0.01

    def __post_init__(self) -> None:
        check(self, epochs=Number(minimum=1, whole=True), learning_rate=Number(above=0))

    def why_not(self, sequential: str) -> str | None:
        """Return the reason unless `sequential` is "block", in which units are whole blocks."""
        if sequential == "block":
            return None
        return "the recovery trains the parts of whole blocks. Use sequential='block' or another recovery."

    def check_processes(self, world_size: int, is_sharded: bool) -> None:
        """Require a single process: each would train on its own batches alone."""
        if world_size > 1:
            raise UserError(
                f"recovery=Reconstruct() trains in one process, but {world_size} prune together. Prune with devices=1, "
                "or without recovery."
            )

    def workspace(self, unit: Unit) -> int:
        """Copies of the weights of a part, gradients in both dtypes, two moments, and the best weights."""
        return 7 * max((sum(layer.size for layer in part.layers) for part in _parts(unit)), default=0)

    def start(self, unit: Unit, masks: TokenMasks) -> UnitRecovery:
        """Find the parts of the unit; a unit that is a single layer has no parts."""
        parts = _parts(unit)
        return _BlockReconstruction(self, unit, parts, masks) if parts else UnitRecovery()


class _Run(NamedTuple):
    """One call of a part: its arguments and keyword arguments, and the output of the dense part."""

    call: Call
    inputs: tuple[tuple[Any, ...], dict[str, Any]]
    output: Tensor


@dataclass
class _Part:
    """A module of a block (attention, MLP, or the block itself) with its pruned layers, and one run for each batch."""

    name: str
    module: nn.Module
    layers: tuple[Layer, ...]
    runs: list[_Run] = field(default_factory=list)
    inputs: tuple[tuple[Any, ...], dict[str, Any]] = (), {}  # of the latest call

    def record_inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Copy the inputs before the forward of the module, which may write into them (a hook)."""
        self.inputs = clone_arguments((args, kwargs))

    def record_output(self, call: Call, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        """Copy the output after the forward of the module (a hook)."""
        self.runs.append(_Run(call, self.inputs, _first_output(output).clone()))


@dataclass
class _BlockReconstruction(UnitRecovery):
    """Records the inputs and outputs of the parts of a dense block, and trains the pruned parts on them."""

    config: Reconstruct
    unit: Unit
    parts: list[_Part]
    masks: TokenMasks

    def record(self, calls: Iterable[Call]) -> Iterator[Call]:
        """Record the parts during each call; a batch that does not count is not recorded."""
        for call in calls:
            if self.masks[call.batch] is None:
                yield call
            else:
                yield replace(call, forward=partial(self._run, call))

    def _run(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        if self.parts[0].module is self.unit.module:  # the batch is parked inside the module, so its hooks do not run
            self.parts[0].record_inputs(self.unit.module, args, kwargs)
            output = call.forward(*args, **kwargs)
            self.parts[0].record_output(call, self.unit.module, args, output)
            return output
        with ExitStack() as hooks:
            for part in self.parts:
                before = part.module.register_forward_pre_hook(part.record_inputs, with_kwargs=True)
                after = part.module.register_forward_hook(partial(part.record_output, call))
                hooks.callback(before.remove)
                hooks.callback(after.remove)
            return call.forward(*args, **kwargs)

    def train(self, show: Callable[[str], None]) -> Iterator[RecoveredPart]:
        """Train part by part; the recorded tensors of a part are freed after its training."""
        while self.parts:
            part = self.parts.pop(0)
            if part.runs:
                show(part.name)
                yield _PartTraining(part, self.config, self.masks).train()


class _PartTraining:
    """Trains the nonzero weights of one part, and writes them at the end of training.

    The part runs outside the block, by `functional_call` with float32 copies of its weights, so that the model does not
    change until training ends.
    """

    def __init__(self, part: _Part, config: Reconstruct, masks: TokenMasks) -> None:
        self._part, self._config, self._masks = part, config, masks
        self._trained = [run for index, run in enumerate(part.runs) if index % _HELD_OUT != _HELD_OUT - 1]
        self._held_out = part.runs[_HELD_OUT - 1 :: _HELD_OUT] or self._trained
        names = {module: name for name, module in part.module.named_modules()}
        paths = {layer.name: f"{names[layer.module]}.{layer.parameter_name}" for layer in part.layers}
        self._weights = {paths[layer.name]: layer.parameter.detach() for layer in part.layers}
        # float32: bfloat16 would lose small steps.
        self._copies = {
            path: weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True).requires_grad_()
            for path, weight in self._weights.items()
        }
        self._keep = {
            path: keep_mask(weight, [layer for layer in part.layers if paths[layer.name] == path])
            for path, weight in self._weights.items()
        }

    def train(self) -> RecoveredPart:
        """Train for at most `epochs` epochs, as long as the held-out error falls."""
        optimizer = torch.optim.Adam(
            [
                {"params": [copy], "lr": self._config.learning_rate * root_mean_square(copy.detach()[keep])}
                for copy, keep in zip(self._copies.values(), self._keep.values(), strict=True)
            ]
        )
        with without_gradients(self._part.module):
            first = least = self._held_out_error()
            best = self._snapshot()
            for _ in range(self._config.epochs):
                self._train_epoch(optimizer)
                if not (error := self._held_out_error()) < least:
                    break
                least, best = error, self._snapshot()
        for path, weight in self._weights.items():
            weight.copy_(best[path])
        energy = float(sum(self._square_sum(run.output, run) for run in self._held_out))
        energy = max(energy, torch.finfo(torch.float32).tiny)
        names = frozenset(layer.name for layer in self._part.layers)
        return RecoveredPart(self._part.name, names, first / energy, least / energy)

    def _train_epoch(self, optimizer: torch.optim.Optimizer) -> None:
        for run in self._trained:
            optimizer.zero_grad()
            self._error(run, training=True).backward()
            for copy, keep in zip(self._copies.values(), self._keep.values(), strict=True):
                if copy.grad is not None:  # Adam skips weights without a gradient
                    copy.grad = masked(copy.grad, keep)
            optimizer.step()

    def _held_out_error(self) -> float:
        return float(torch.stack([self._error(run) for run in self._held_out]).sum())

    def _error(self, run: _Run, training: bool = False) -> Tensor:
        with run.call.thread_state.entered(), torch.set_grad_enabled(training):
            values = {path: copy.to(self._weights[path].dtype) for path, copy in self._copies.items()}
            args, kwargs = clone_arguments(run.inputs)  # a part may write into its inputs
            output = _first_output(functional_call(self._part.module, values, args, kwargs))
            return self._square_sum(output - run.output, run)

    def _square_sum(self, x: Tensor, run: _Run) -> Tensor:
        """Sum the squares over all tokens except padding."""
        if mask := fitting_mask(self._masks[run.call.batch] or (), self._part.name, x):
            x = x.flatten(0, -2)[mask.keep.flatten().to(x.device)]
        return widened(x).square().sum()

    def _snapshot(self) -> dict[str, Tensor]:
        return {path: copy.detach().clone() for path, copy in self._copies.items()}


def _parts(unit: Unit) -> list[_Part]:
    """Return the children of a block if they hold all its layers, otherwise the block itself; a layer has no parts."""
    if unit.module is None or any(layer.module is unit.module for layer in unit.layers):
        return []
    parts = [_part(f"{unit.name}.{name}", module, unit.layers) for name, module in _called_children(unit.module)]
    parts = [part for part in parts if part.layers]
    if sum(len(part.layers) for part in parts) < len(unit.layers):
        return [_part(unit.name, unit.module, unit.layers)]
    return parts


def _called_children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the children of a module, with the members of a list or dictionary in place of the container."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from ((f"{name}.{inner}", grandchild) for inner, grandchild in _called_children(child))
        else:
            yield name, child


def _part(name: str, module: nn.Module, layers: Sequence[Layer]) -> _Part:
    inside = {child for child in module.modules() if child is not module}
    return _Part(name, module, tuple(layer for layer in layers if layer.module in inside))


def _first_output(output: object) -> Tensor:
    """Return the first floating-point tensor in the output of a part."""
    return next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point())
