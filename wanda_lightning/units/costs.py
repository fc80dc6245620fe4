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
from wanda_lightning.planning.run import Run
from wanda_lightning.units.candidates import RemovableUnits, Slot

_RUNS = 7  # of each block, after one that warms up


def unit_costs(run: Run, units: Mapping[str, RemovableUnits]) -> dict[str, float]:
    """Return what a hidden unit costs, by the layer that reads it, as the allocation asks; empty if all cost 1.

    The parameters and multiply-adds are those of all tensors with entries for the unit. The seconds of a block are the
    shortest of seven runs on the first calibration batch, divided by the number of its units. One process measures.
    """
    processes = run.plan.processes
    cost = run.plan.config.allocation.cost
    if cost == "units":
        return {}

    with processes.fail_together():
        batches = run.samples.first_batches(1)[:1]
    has_batch = [bool(number) for (number,) in processes.all_gather([len(batches)])]
    measuring_rank = has_batch.index(True)
    if processes.rank != measuring_rank:
        batches = []

    if cost == "seconds":
        costs = _seconds(run, units, batches)
    else:
        with processes.fail_together():
            costs = _multiply_adds(units, batches) if cost == "macs" else _parameters(units)
    return processes.broadcast(costs, measuring_rank)


def _parameters(units: Mapping[str, RemovableUnits]) -> dict[str, float]:
    """Return the number of parameters of one unit, by reader."""
    return {
        name: sum(
            _entries(slot)
            for slot in _distinct_slots(removable)
            if isinstance(slot.tensor, nn.Parameter)
        )
        for name, removable in units.items()
    }


def _multiply_adds(
    units: Mapping[str, RemovableUnits], batches: Sequence[Sample]
) -> dict[str, float]:
    """Return the multiply-adds of one unit, by reader: its entries in matrices, at each position of a batch."""
    positions = _positions(units, batches)
    return {
        name: sum(
            _entries(slot) * positions.get(slot.module, 0.0)
            for slot in _distinct_slots(removable)
            if slot.tensor.ndim > 1
        )
        for name, removable in units.items()
    }


def _distinct_slots(units: RemovableUnits) -> Sequence[Slot]:
    return list({slot.key: slot for slot in units.slots}.values())


def _entries(slot: Slot) -> float:
    """Return the number of entries of a tensor that belong to one unit."""
    lines_of_unit = slot.index[..., 0].numel()
    return slot.tensor.numel() / slot.tensor.shape[slot.dim] * lines_of_unit


def _positions(
    units: Mapping[str, RemovableUnits], batches: Sequence[Sample]
) -> dict[nn.Module, float]:
    """Return at how many positions of the batch each module with a matrix of units computes an output."""
    positions: dict[nn.Module, float] = {}

    def count(module: Any, args: object, output: object) -> None:
        layer = whole_layer(module)
        channels = (
            layer.shape[0] if layer else len(module.weight)
        )  # no layer: a depthwise convolution
        outputs = tensors_within(output)[0]
        positions[module] = positions.get(module, 0.0) + outputs.numel() / channels

    modules = {
        slot.module
        for removable in units.values()
        for slot in removable.slots
        if slot.tensor.ndim > 1
    }
    with ExitStack() as hooks:
        for module in modules:
            hooks.callback(module.register_forward_hook(count).remove)
        for batch in batches:
            batch.forward()
    return positions


def _seconds(
    run: Run, units: Mapping[str, RemovableUnits], batches: Sequence[Sample]
) -> dict[str, float]:
    """Return the seconds of each block for each of its units; empty if the model has no blocks."""
    plan = run.plan
    costs: dict[str, float] = {}
    with (
        ProgressBar("Timing blocks", len(plan.block_stops), run.progress) as bar,
        closing(lockstep(plan.block_stops, batches, plan.processes, model=plan.model)) as visits,
    ):
        for block, calls in visits:
            with plan.processes.fail_together():
                device = block.layers[0].weight.device
                seconds = sum(_seconds_of(call, device) for call in calls)
            width = sum(units[layer.name].width for layer in block.layers)
            for layer in block.layers:
                costs[layer.name] = seconds / width
            bar.advance()
    return costs


def _seconds_of(call: Call, device: torch.device) -> float:
    """Return the shortest time of several runs of a call: other programs only make it longer."""
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
    return min(times[1:])
