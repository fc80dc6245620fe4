"""Sum the statistics of several processes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

from wanda_lightning.core.statistics import SUMS, InputStatistics
from wanda_lightning.models import Layer
from wanda_lightning.parallel import Processes

_UNREACHED = -1


def all_reduce_statistics(
    layers: Sequence[Layer],
    own: Mapping[str, InputStatistics],
    padding_counted: Collection[str],
    needs: frozenset[str],
    processes: Processes,
) -> tuple[dict[str, InputStatistics], set[str]]:
    """Sum the statistics over all processes, in one object for each distinct input.

    The layout of the message does not depend on which layers the batches of a process reached.

    Args:
        layers: Layers of a unit.
        own: The statistics of this process for each layer that its batches reached.
        padding_counted: Layers whose statistics include padding in this process.
        needs: Names of the sums.
        processes: The processes.

    Returns:
        The statistics of every layer, with a count of 0 if no batch reached it; and the layers whose statistics include
        padding in any process.
    """
    groups = _same_inputs(layers, own, processes)
    totals: dict[str, InputStatistics] = {}
    for group in groups:
        first = group[0]
        # From the weight: a process whose batches did not reach the layer does not know the dtype of its input.
        dtype = torch.promote_types(first.weight.dtype, torch.float32)
        token = first.weight.new_zeros(1, first.shape[1], dtype=dtype)
        total = InputStatistics(needs)
        total.sums = {name: SUMS[name](token) for name in sorted(needs)}
        if first.name in own:
            total.count = own[first.name].count
            for name, value in own[first.name].sums.items():
                total.sums[name].copy_(value)
        totals.update(dict.fromkeys((layer.name for layer in group), total))
    distinct = [totals[group[0].name] for group in groups]
    counts = torch.tensor([total.count for total in distinct], dtype=torch.int64)
    padded = torch.tensor([layer.name in padding_counted for layer in layers], dtype=torch.int64)
    processes.all_reduce_sum([counts, padded, *(value for total in distinct for value in total.sums.values())])
    for total, count in zip(distinct, counts.tolist(), strict=True):
        total.count = count
    return totals, {layer.name for layer, times in zip(layers, padded.tolist(), strict=True) if times}


def _same_inputs(
    layers: Sequence[Layer], own: Mapping[str, InputStatistics], processes: Processes
) -> list[list[Layer]]:
    """Group the layers that have the same input in every process, or are unreached together in it."""
    first: dict[int, int] = {}
    here = [
        first.setdefault(id(own[layer.name]), index) if layer.name in own else _UNREACHED
        for index, layer in enumerate(layers)
    ]
    groups: dict[tuple[int, ...], list[Layer]] = {}
    for index, (layer, column) in enumerate(zip(layers, zip(*processes.all_gather(here), strict=True), strict=True)):
        reached = any(leader != _UNREACHED for leader in column)
        groups.setdefault(column if reached else (*column, index), []).append(layer)
    return list(groups.values())
