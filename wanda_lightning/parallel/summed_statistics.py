"""Sum the statistics of inputs over several processes."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from wanda_lightning.common.float64 import widened
from wanda_lightning.core.statistics import SUMS, Inputs, InputStatistics
from wanda_lightning.parallel.processes import Processes

_UNREACHED = -1  # no batch of a process reached the layer


def all_reduce_statistics(
    zero_tokens: Mapping[str, Tensor],
    collected: Inputs,
    padding_counted: Collection[str],
    needs: frozenset[str],
    processes: Processes,
) -> tuple[dict[str, InputStatistics], set[str]]:
    """Sum the statistics of some layers over all processes, in one object for each distinct input.

    `zero_tokens` holds a token (1, d_in) for each layer. `collected` are the statistics of this process, and
    `padding_counted` names the layers whose statistics include padding. The layout of the message does not depend on
    which layers the batches of a process reached, since all processes must send messages of the same layout.

    Returns:
        The statistics of every layer, with a count of 0 if no batch reached it; and the layers whose statistics include
        padding in any process.
    """
    totals = {}
    distinct = []
    for layers in _layers_by_input(list(zero_tokens), collected, processes):
        first = layers[0]
        # In a dtype that is equal in all processes, and sorted, as the order of a set differs between them.
        token = widened(zero_tokens[first])
        total = InputStatistics(needs)
        total.sums = {name: SUMS[name](token) for name in sorted(needs)}
        own = collected.get(first)
        if own is not None:
            total.count = own.count
            for name, value in own.sums.items():
                total.sums[name].copy_(value)
        distinct.append(total)
        totals.update(dict.fromkeys(layers, total))

    counts = torch.tensor([total.count for total in distinct], dtype=torch.int64)
    padded = torch.tensor([name in padding_counted for name in zero_tokens], dtype=torch.int64)
    sums = [value for total in distinct for value in total.sums.values()]
    processes.all_reduce_sum([counts, padded, *sums])

    for total, count in zip(distinct, counts.tolist(), strict=True):
        total.count = count
    return totals, {name for name, times in zip(zero_tokens, padded.tolist(), strict=True) if times}


def _layers_by_input(
    layers: Collection[str], collected: Inputs, processes: Processes
) -> list[list[str]]:
    """Group the layers that have the same input in every process, or are unreached together in it."""
    # For each layer, the index of the first one with the same statistics in this process.
    seen: dict[int, int] = {}
    leaders = []
    for index, layer in enumerate(layers):
        is_reached = layer in collected
        leaders.append(seen.setdefault(id(collected[layer]), index) if is_reached else _UNREACHED)

    groups: dict[tuple[int, ...], list[str]] = {}
    by_layer = zip(layers, *processes.all_gather(leaders), strict=True)
    for index, (layer, *in_processes) in enumerate(by_layer):
        # A layer that no batch reaches shares its input with none.
        own_group = index if max(in_processes) == _UNREACHED else 0
        groups.setdefault((*in_processes, own_group), []).append(layer)
    return list(groups.values())
