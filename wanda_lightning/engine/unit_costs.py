"""What a hidden unit costs: parameters, multiply-adds, or a share of the time of its block."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from wanda_lightning.calibration.lockstep import Call
from wanda_lightning.engine.plan import Plan
from wanda_lightning.engine.run import Run, dense_blocks
from wanda_lightning.models.hidden_units import Slot
from wanda_lightning.models.layers import whole_layer

_RUNS = 7  # of each block, after one that warms up


def unit_costs(run: Run) -> dict[str, float]:
    """Return what a hidden unit costs, for each layer that reads some, as the allocation asks; nothing if all cost 1.

    The parameters and multiply-adds are those of all tensors with entries for the unit. The seconds of a block are the
    shortest of seven runs on the first calibration batch, divided by the number of its units.
    """
    plan, cost = run.plan, run.plan.config.allocation.unit_cost
    if cost == "units":
        return {}
    found = _seconds(run) if cost == "seconds" else _sizes(plan, _positions(run) if cost == "macs" else None)
    return plan.processes.broadcast(found, 0)  # times differ between processes


def _sizes(plan: Plan, positions: Mapping[nn.Module, float] | None) -> dict[str, float]:
    """Return the entries of a unit in all its tensors, each times the positions of its module, if they are given."""

    def size(slot: Slot) -> float:
        entries = slot.tensor.numel() / slot.tensor.shape[slot.dim] * slot.index[..., 0].numel()
        is_counted = isinstance(slot.tensor, nn.Parameter) if positions is None else slot.tensor.ndim > 1
        return entries * is_counted * (1.0 if positions is None else positions.get(slot.module, 0.0))

    distinct = {name: {slot.key: slot for slot in units.slots} for name, units in plan.coupled.items()}
    return {name: sum(map(size, slots.values())) for name, slots in distinct.items()}


def _positions(run: Run) -> dict[nn.Module, float]:
    """Return at how many positions of the first sample each module with a matrix of units computes an output."""
    found: dict[nn.Module, float] = {}

    def count(module: Any, args: object, output: Tensor) -> None:
        layer = whole_layer(module)  # None for a depthwise convolution
        found[module] = found.get(module, 0.0) + output.numel() / (layer.shape[0] if layer else len(module.weight))

    with ExitStack() as hooks, run.plan.processes.fail_together():
        slots = (slot for units in run.plan.coupled.values() for slot in units.slots if slot.tensor.ndim > 1)
        for module in {slot.module for slot in slots}:
            hooks.callback(module.register_forward_hook(count).remove)
        for sample in run.samples.head(1):
            sample.forward()
    return found


def _seconds(run: Run) -> dict[str, float]:
    """Return the seconds of each block for each of its units; nothing if the model has no blocks."""
    plan, found = run.plan, dict[str, float]()
    first = run.samples.first(1)
    count = sum(plan.processes.all_gather([first[0].size if first else 0])[0])
    with closing(dense_blocks(run, plan.block_stops, count, "Timing blocks", set())) as blocks:
        for block, calls in blocks:
            seconds = sum(_seconds_of(call) for call in calls)
            width = sum(plan.coupled[layer.name].width for layer in block.layers)
            found |= {layer.name: seconds / width for layer in block.layers}
    return found


def _seconds_of(call: Call) -> float:
    times: list[float] = []

    def timed(*args: Any, **kwargs: Any) -> None:
        _synchronize()
        started = time.perf_counter()
        call.forward(*args, **kwargs)
        _synchronize()
        times.append(time.perf_counter() - started)

    for _ in range(1 + _RUNS):
        replace(call, forward=timed).run(on_copies=True)
    return min(times[1:])  # other programs only make it longer


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
