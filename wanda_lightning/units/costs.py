"""The cost of a hidden unit: its share of the time of its block."""

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch

from wanda_lightning.calibration.lockstep import Call, lockstep
from wanda_lightning.calibration.samples import Sample
from wanda_lightning.common.progress import ProgressBar
from wanda_lightning.loop.run import Run
from wanda_lightning.units.candidates import UnitsByReader

_RUNS = 7  # of each block, after one that warms up


def unit_costs(run: Run, units: UnitsByReader) -> dict[str, float]:
    """Return the seconds of a hidden unit, by the layer that reads it; empty if the allocation does not ask for them.

    The seconds of a block are the shortest of seven runs on the first calibration batch, divided by the number of its
    units. One process measures.
    """
    processes = run.plan.processes
    if run.plan.config.allocation.cost == "units":
        return {}

    with processes.fail_together():
        batches = run.samples.first_batches(1)[:1]
    has_batch = [bool(number) for (number,) in processes.all_gather([len(batches)])]
    measuring_rank = has_batch.index(True)
    if processes.rank != measuring_rank:
        batches = []
    return processes.broadcast(_seconds(run, units, batches), measuring_rank)


def _seconds(run: Run, units: UnitsByReader, batches: Sequence[Sample]) -> dict[str, float]:
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
