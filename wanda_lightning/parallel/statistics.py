"""Sum the statistics of inputs over several processes."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from wanda_lightning.core.statistics import SUMS, InputStatistics
from wanda_lightning.parallel.processes import Processes


def all_reduce_statistics(
    tokens: Mapping[str, Tensor],
    own: Mapping[str, InputStatistics],
    padding_counted: Collection[str],
    needs: frozenset[str],
    processes: Processes,
) -> tuple[dict[str, InputStatistics], set[str]]:
    """Sum the statistics of some layers over all processes, in one object for each distinct input.

    `tokens` holds a token (1, d_in) for each layer, `own` and `padding_counted` what this process has found. The layout
    of the message does not depend on which layers its batches reached.

    Returns:
        The statistics of every layer, with a count of 0 if no batch reached it; and the layers whose statistics include
        padding in any process.
    """
    totals: dict[str, InputStatistics] = {}
    distinct: list[InputStatistics] = []
    for group in _same_inputs(list(tokens), own, processes):
        first = group[0]
        total = InputStatistics(needs)
        token = tokens[first].to(torch.promote_types(tokens[first].dtype, torch.float32))
        total.sums = {name: SUMS[name](token) for name in sorted(needs)}
        if first in own:
            total.count = own[first].count
            for name, value in own[first].sums.items():
                total.sums[name].copy_(value)
        distinct.append(total)
        totals.update(dict.fromkeys(group, total))
    counts = torch.tensor([total.count for total in distinct], dtype=torch.int64)
    padded = torch.tensor([name in padding_counted for name in tokens], dtype=torch.int64)
    processes.all_reduce_sum(
        [counts, padded, *(value for total in distinct for value in total.sums.values())]
    )
    for total, count in zip(distinct, counts.tolist(), strict=True):
        total.count = count
    return totals, {name for name, times in zip(tokens, padded.tolist(), strict=True) if times}


_UNREACHED = -1


def _same_inputs(
    layers: Collection[str], own: Mapping[str, InputStatistics], processes: Processes
) -> list[list[str]]:
    """Group the layers that have the same input in every process, or are unreached together in it."""
    first: dict[int, int] = {}
    here = [
        first.setdefault(id(own[layer]), index) if layer in own else _UNREACHED
        for index, layer in enumerate(layers)
    ]
    groups: dict[tuple[int, ...], list[str]] = {}
    for index, (layer, column) in enumerate(
        zip(layers, zip(*processes.all_gather(here), strict=True), strict=True)
    ):
        reached = any(leader != _UNREACHED for leader in column)
        groups.setdefault(column if reached else (*column, index), []).append(layer)
    return list(groups.values())
