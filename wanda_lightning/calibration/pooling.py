"""Sum statistics over processes, and over the experts of a module that received few tokens."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

from wanda_lightning.core.statistics import SUMS, InputStatistics
from wanda_lightning.models import Layer
from wanda_lightning.parallel import Processes

MIN_EXPERT_TOKENS = 32  # a norm over n Gaussian inputs has a relative error of 0.7 / sqrt(n)


def merged(parts: Sequence[InputStatistics]) -> InputStatistics:
    """Return the sum of at least one part."""
    total = InputStatistics(parts[0].needs)
    for part in parts:
        total.merge(part)
    return total


def pool_experts(
    layers: Sequence[Layer], statistics: Mapping[str, InputStatistics], minimum: int
) -> tuple[dict[str, InputStatistics], dict[str, int]]:
    """Replace the statistics of each expert with too few tokens, or none, with the sum over its siblings in this unit.

    Return the statistics of all layers, and each pooled expert's own number of tokens.
    """
    families: dict[str, list[str]] = {}
    for layer in layers:
        if layer.siblings:
            families.setdefault(layer.siblings, []).append(layer.name)
    result, pooled = dict(statistics), {}
    for names in families.values():
        counts = {name: statistics[name].count if name in statistics else 0 for name in names}
        everything = sum(counts.values())
        few = {name: count for name, count in counts.items() if count < max(minimum, 1) and count < everything}
        if few:
            total = merged([statistics[name] for name, count in counts.items() if count])
            result.update(dict.fromkeys(few, total))
            pooled.update(few)
    return result, pooled


def all_reduce_statistics(
    layers: Sequence[Layer],
    own: Mapping[str, InputStatistics],
    padding_counted: Collection[str],
    needs: frozenset[str],
    processes: Processes,
) -> tuple[dict[str, InputStatistics], set[str]]:
    """Sum the statistics of the layers of a unit over all processes, in one object for each distinct input.

    `own` and `padding_counted` are those of this process. The layout of the message does not depend on which layers its
    batches reached.

    Returns:
        The statistics of every layer, with a count of 0 if no batch reached it; and the layers whose statistics include
        padding in any process.
    """
    totals: dict[str, InputStatistics] = {}
    distinct: list[InputStatistics] = []
    for group in _same_inputs(layers, own, processes):
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
        distinct.append(total)
        totals.update(dict.fromkeys((layer.name for layer in group), total))
    counts = torch.tensor([total.count for total in distinct], dtype=torch.int64)
    padded = torch.tensor([layer.name in padding_counted for layer in layers], dtype=torch.int64)
    processes.all_reduce_sum([counts, padded, *(value for total in distinct for value in total.sums.values())])
    for total, count in zip(distinct, counts.tolist(), strict=True):
        total.count = count
    return totals, {layer.name for layer, times in zip(layers, padded.tolist(), strict=True) if times}


_UNREACHED = -1


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
