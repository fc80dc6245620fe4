"""Train the parts of a pruned block to give again what they gave when it was dense."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from wanda_lightning.calibration.batch_thread import Call
from wanda_lightning.calibration.cloning import clone_arguments
from wanda_lightning.calibration.gradients import without_gradients
from wanda_lightning.core.solvers import Reconstruct, masked
from wanda_lightning.models import Layer, TokenMask, Unit, fitting_mask

_HELD_OUT = 4  # every so many batches one is not trained on


class _Run(NamedTuple):
    """One call of a part: what entered (arguments and keywords), and what the dense part gave."""

    call: Call
    inputs: tuple[tuple[Any, ...], dict[str, Any]]
    output: Tensor


@dataclass
class Part:
    """A module of a block that is trained for itself.

    Attributes:
        name: As in the model.
        module: An attention, an MLP, or the block.
        layers: Those in it that are pruned.
        runs: What went through it.
    """

    name: str
    module: nn.Module
    layers: tuple[Layer, ...]
    runs: list[_Run] = field(default_factory=list)


def recorded(
    unit: Unit, calls: Iterable[Call], masks: Sequence[tuple[TokenMask, ...] | None]
) -> tuple[list[Part], Iterator[Call]]:
    """The parts of a dense unit, and its calls: to be run once each, which records what the parts see and give."""
    parts = _parts(unit)

    def watched() -> Iterator[Call]:
        for call in calls:
            counts = parts and masks[call.batch] is not None
            yield replace(call, forward=partial(_record, parts, unit, call)) if counts else call

    return parts, watched()


def _record(parts: Sequence[Part], unit: Unit, call: Call, *args: Any, **kwargs: Any) -> Any:
    if parts[0].module is unit.module:  # parked: its own hooks do not run
        inputs = clone_arguments((args, kwargs))
        output = call.forward(*args, **kwargs)
        parts[0].runs.append(_Run(call, inputs, _output(output).clone()))
        return output
    with ExitStack() as hooks:
        for part in parts:
            hook = part.module.register_forward_hook(_hook(part, call), with_kwargs=True)
            hooks.callback(hook.remove)
        return call.forward(*args, **kwargs)


def train(part: Part, solver: Reconstruct, masks: Sequence[tuple[TokenMask, ...] | None]) -> tuple[float, float]:
    """Train the weights of a part that are not zero, and write them when all is done.

    Returns:
        The squared error before and after, as a share of what the dense part gave, on batches that were held out.
    """
    trained = [run for index, run in enumerate(part.runs) if index % _HELD_OUT != _HELD_OUT - 1]
    held_out = part.runs[_HELD_OUT - 1 :: _HELD_OUT] or trained
    inside = {module: name for name, module in part.module.named_modules()}
    paths = {layer.name: f"{inside[layer.module]}.{layer.parameter_name}" for layer in part.layers}
    weights = {paths[layer.name]: layer.parameter.detach() for layer in part.layers}
    # Wider than bfloat16, where small steps would be lost.
    masters = {
        name: weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True).requires_grad_()
        for name, weight in weights.items()
    }
    trains = {name: torch.zeros_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    for layer in part.layers:  # of a parameter that holds many, some may be left dense
        layer.part(trains[paths[layer.name]]).copy_(layer.weight != 0)

    def squares(x: Tensor, run: _Run) -> Tensor:
        if mask := fitting_mask(masks[run.call.batch] or (), part.name, x):
            x = x.flatten(0, -2)[mask.keep.flatten().to(x.device)]
        return x.to(torch.promote_types(x.dtype, torch.float32)).square().sum()

    def error(run: _Run, training: bool = False) -> Tensor:
        with run.call.thread_state.entered(), torch.set_grad_enabled(training):
            values = {name: master.to(weights[name].dtype) for name, master in masters.items()}
            args, kwargs = clone_arguments(run.inputs)  # a part may write into its inputs
            output = _output(functional_call(part.module, values, args, kwargs))
            return squares(output - run.output, run)

    def errors() -> float:
        return float(torch.stack([error(run) for run in held_out]).sum())

    optimizer = torch.optim.Adam(
        [
            {"params": [master], "lr": solver.learning_rate * _root_mean_square(master.detach()[trains[name]])}
            for name, master in masters.items()
        ]
    )
    with without_gradients(part.module):
        first = least = errors()
        best = {name: master.detach().clone() for name, master in masters.items()}
        for _ in range(solver.epochs):
            for run in trained:
                optimizer.zero_grad()
                error(run, training=True).backward()
                for name, master in masters.items():
                    if master.grad is not None:  # without a gradient Adam leaves a weight as it is
                        master.grad = masked(master.grad, trains[name])
                optimizer.step()
            if not (now := errors()) < least:
                break
            least = now
            best = {name: master.detach().clone() for name, master in masters.items()}
    for name, weight in weights.items():
        weight.copy_(best[name])
    energy = max(float(sum(squares(run.output, run) for run in held_out)), torch.finfo(torch.float32).tiny)
    return first / energy, least / energy


def _parts(unit: Unit) -> list[Part]:
    """The children of a block that hold all its layers; else the block; of a layer alone none."""
    if unit.module is None or any(layer.module is unit.module for layer in unit.layers):
        return []
    parts = [_part(f"{unit.name}.{name}", module, unit.layers) for name, module in _called(unit.module)]
    parts = [part for part in parts if part.layers]
    if sum(len(part.layers) for part in parts) < len(unit.layers):
        return [_part(unit.name, unit.module, unit.layers)]
    return parts


def _called(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Children that have a forward: those of a list instead of the list."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from ((f"{name}.{inner}", grandchild) for inner, grandchild in _called(child))
        else:
            yield name, child


def _part(name: str, module: nn.Module, layers: Sequence[Layer]) -> Part:
    inside = {child for child in module.modules() if child is not module}
    return Part(name, module, tuple(layer for layer in layers if layer.module in inside))


def _hook(part: Part, call: Call) -> Callable[..., None]:
    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        part.runs.append(_Run(call, clone_arguments((args, kwargs)), _output(output).clone()))

    return keep


def _output(output: object) -> Tensor:
    """The first floating-point tensor of what a part gives."""
    return next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point())


def _root_mean_square(weights: Tensor) -> float:
    return float(weights.square().mean().sqrt()) if len(weights) else 0.0
