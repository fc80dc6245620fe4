"""The order of samples and the sum of losses, for several processes that train one model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch

from wanda_lightning.parallel import Processes

_Item = TypeVar("_Item")


def in_one_order(batches: Sequence[Sequence[_Item]], processes: Processes) -> list[_Item | None]:
    """Return the samples of all processes in one order; None stands for a sample of another process.

    Batch i of all processes precedes batch i + 1 of any, so that the order depends on the batches alone.
    """
    order: list[_Item | None] = []
    longest = max(number for (number,) in processes.all_gather([len(batches)]))
    sizes = processes.all_gather([len(batch) for batch in batches] + [0] * (longest - len(batches)))
    for index in range(longest):
        for rank in range(processes.world_size):
            order += batches[index] if rank == processes.rank and index < len(batches) else [None] * sizes[rank][index]
    return order


def sum_over_processes(losses: Callable[[], Iterable[float]], processes: Processes) -> float:
    """Return the sum of the losses of all processes; an error in one of them ends all."""
    total = torch.zeros(1, dtype=torch.float64)  # a Trainer may set the default to 16 bits
    with processes.fail_together():
        for loss in losses():
            total += loss
    processes.all_reduce_sum([total])
    return float(total)
