"""One order of the samples of all processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from wanda_lightning.parallel import Processes

Sample = TypeVar("Sample")


def in_one_order(batches: Sequence[Sequence[Sample]], processes: Processes) -> list[Sample | None]:
    """Return the samples of all processes in one order; None stands for a sample of another process.

    Batch i of all processes precedes batch i + 1 of any, so that the order depends on the batches alone.
    """
    order: list[Sample | None] = []
    longest = max(number for (number,) in processes.all_gather([len(batches)]))
    sizes = processes.all_gather([len(batch) for batch in batches] + [0] * (longest - len(batches)))
    for index in range(longest):
        for rank in range(processes.world_size):
            order += batches[index] if rank == processes.rank and index < len(batches) else [None] * sizes[rank][index]
    return order
