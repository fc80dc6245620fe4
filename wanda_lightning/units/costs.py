"""What a hidden unit costs: parameters, multiply-adds, or a share of the time of its block."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from wanda_lightning.calibration.lockstep import Call, lockstep
from wanda_lightning.calibration.samples import Sample
from wanda_lightning.calibration.trees import tensors_within
from wanda_lightning.common.progress import ProgressBar
from wanda_lightning.models.layers import whole_layer
from wanda_lightning.planning.plan import Plan
from wanda_lightning.planning.run import Run
from wanda_lightning.units.candidates import Slot

_RUNS = 7  # of each block, after one that warms up


def unit_costs(run: Run) -> dict[str, float]:
    """Return what a hidden unit costs, for each layer that reads some, as the allocation asks; nothing if all cost 1.

    The parameters and multiply-adds are those of all tensors with entries for the unit. The seconds of a block are the
    shortest of seven runs on the first calibration batch, divided by the number of its units. One process measures.
    """
    plan, cost = run.plan, run.plan.config.allocation.cost
    if cost == "units":
        return {}
    with plan.processes.fail_together():
        batches = run.samples.first_batches(1)[:1]
    measures = [bool(number) for (number,) in plan.processes.all_gather([len(batches)])].index(True)
    batches = batches if plan.processes.rank == measures else []
    if cost == "seconds":
        found = _seconds(run, batches)
    else:
        with plan.processes.fail_together():
            found = _sizes(plan, _positions(plan, batches) if cost == "macs" else None)
    return plan.processes.broadcast(found, measures)


def _sizes(plan: Plan, positions: Mapping[nn.Module, float] | None) -> dict[str, float]:
    """Return the entries of a unit in all its tensors, each times the positions of its module, if they are given."""

    def size(slot: Slot) -> float:
        entries = slot.tensor.numel() / slot.tensor.shape[slot.dim] * slot.index[..., 0].numel()
        is_counted = (
            isinstance(slot.tensor, nn.Parameter) if positions is None else slot.tensor.ndim > 1
        )
        return (
            entries * is_counted * (1.0 if positions is None else positions.get(slot.module, 0.0))
        )

    distinct = {
        name: {slot.key: slot for slot in units.slots} for name, units in plan.coupled.items()
    }
    return {name: sum(map(size, slots.values())) for name, slots in distinct.items()}


def _positions(plan: Plan, batches: Sequence[Sample]) -> dict[nn.Module, float]:
    """Return at how many positions of the batch each module with a matrix of units computes an output."""
    found: dict[nn.Module, float] = {}

    def count(module: Any, args: object, output: object) -> None:
        layer = whole_layer(module)
        outputs = tensors_within(output)  # no layer: a depthwise convolution
        found[module] = found.get(module, 0.0) + outputs[0].numel() / (
            layer.shape[0] if layer else len(module.weight)
        )

    with ExitStack() as hooks:
        slots = (
            slot for units in plan.coupled.values() for slot in units.slots if slot.tensor.ndim > 1
        )
        for module in {slot.module for slot in slots}:
            hooks.callback(module.register_forward_hook(count).remove)
        for batch in batches:
            batch.forward()
    return found


def _seconds(run: Run, batches: Sequence[Sample]) -> dict[str, float]:
    """Return the seconds of each block for each of its units; nothing if the model has no blocks."""
    plan = run.plan
    found = dict[str, float]()
    with (
        ProgressBar("Timing blocks", len(plan.block_stops), run.progress) as bar,
        closing(lockstep(plan.block_stops, batches, plan.processes, model=plan.model)) as blocks,
    ):
        for block, calls in blocks:
            with plan.processes.fail_together():
                seconds = sum(_seconds_of(call, block.layers[0].weight.device) for call in calls)
            width = sum(plan.coupled[layer.name].width for layer in block.layers)
            found |= {layer.name: seconds / width for layer in block.layers}
            bar.advance()
    return found


def _seconds_of(call: Call, device: torch.device) -> float:
    times: list[float] = []

    def wait() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    def timed(*args: Any, **kwargs: Any) -> None:
        wait()
        started = time.perf_counter()
        call.forward(*args, **kwargs)
        wait()
        times.append(time.perf_counter() - started)

    for _ in range(1 + _RUNS):
        replace(call, forward=timed).run(on_copies=True)
    return min(times[1:])  # other programs only make it longer
