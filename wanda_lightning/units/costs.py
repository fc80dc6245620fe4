"""What a hidden unit costs: parameters, multiply-adds, or a share of the time of its block."""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import Module

from wanda_lightning.calibration.lockstep import Call, lockstep
from wanda_lightning.calibration.samples import Sample
from wanda_lightning.calibration.trees import tensors_within
from wanda_lightning.common.progress import ProgressBar
from wanda_lightning.models.layers import whole_layer
from wanda_lightning.planning.run import Run
from wanda_lightning.units.candidates import Slot, UnitsByReader

_RUNS = 7  # of each block, after one that warms up


_Costs = dict[str, float]  # of one unit, by the layer that reads it


def unit_costs(run: Run, units: UnitsByReader) -> _Costs:
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
            entry_cost = _multiply_adds(units, batches) if cost == "macs" else _is_parameter
            costs = _sums(units, entry_cost)
    return processes.broadcast(costs, measuring_rank)


def _sums(units: UnitsByReader, entry_cost: Callable[[Slot], float]) -> _Costs:
    """Return the cost of one unit, by reader, from the cost of an entry of each tensor."""
    costs = {}
    for name, removable in units.items():
        slots = {slot.key: slot for slot in removable.slots}.values()
        costs[name] = sum(_entries(slot) * entry_cost(slot) for slot in slots)
    return costs


def _is_parameter(slot: Slot) -> bool:
    return isinstance(slot.tensor, nn.Parameter)


def _multiply_adds(units: UnitsByReader, batches: Sequence[Sample]) -> Callable[[Slot], float]:
    """Return a function for the multiply-adds of an entry: each entry of a matrix has one at each position."""
    positions = _positions(units, batches)
    return lambda slot: positions[slot.module] if slot.tensor.ndim > 1 else 0.0


def _entries(slot: Slot) -> float:
    """Return the number of entries of a tensor that belong to one unit."""
    lines_of_unit = slot.index[..., 0].numel()
    return slot.tensor.numel() / slot.tensor.shape[slot.dim] * lines_of_unit


def _positions(units: UnitsByReader, batches: Sequence[Sample]) -> dict[Module, float]:
    """Return at how many positions of the batch each module with a matrix of units computes an output."""
    positions = defaultdict[Module, float](float)

    def count(module: Any, args: object, output: object) -> None:
        layer = whole_layer(module)
        # Otherwise it is a depthwise convolution.
        channels = layer.shape[0] if layer else len(module.weight)
        positions[module] += tensors_within(output)[0].numel() / channels

    modules = {
        slot.module
        for removable in units.values()
        for slot in removable.slots
        if slot.tensor.ndim > 1
    }
    with ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_hook(count))
        for batch in batches:
            batch.forward()
    return positions


def _seconds(run: Run, units: UnitsByReader, batches: Sequence[Sample]) -> _Costs:
    """Return the seconds of each block for each of its units; empty if the model has no blocks."""
    plan = run.plan
    costs = {}
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
    times = []

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
