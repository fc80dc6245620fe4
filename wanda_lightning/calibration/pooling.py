"""Pool the statistics of experts with few tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from wanda_lightning.core.statistics import InputStatistics
from wanda_lightning.models import Layer


def merged(parts: Sequence[InputStatistics]) -> InputStatistics:
    """Return the sum of at least one part."""
    total = InputStatistics(parts[0].needs)
    for part in parts:
        total.merge(part)
    return total


def pool(
    layers: Sequence[Layer], statistics: Mapping[str, InputStatistics], minimum: int
) -> tuple[dict[str, InputStatistics], dict[str, int]]:
    """Replace the statistics of each expert with too few tokens with the sum over all its siblings.

    Args:
        layers: Layers of one unit; siblings in other units are not included.
        statistics: Statistics of each layer that a batch reached.
        minimum: Experts with fewer tokens are pooled; experts without any token always are.

    Returns:
        The statistics of all layers, and each pooled expert's own number of tokens.
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
