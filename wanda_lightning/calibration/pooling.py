"""Help experts that saw few tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from wanda_lightning.core.statistics import InputStatistics
from wanda_lightning.models import Layer


def pool(
    layers: Sequence[Layer], statistics: Mapping[str, InputStatistics], minimum: int
) -> tuple[dict[str, InputStatistics], dict[str, int]]:
    """Give experts that saw too few tokens the sums over all that are their siblings.

    Args:
        layers: Of one unit: siblings in another one are not known.
        statistics: Of each layer that was reached.
        minimum: How many tokens are enough; with 0 only experts that saw none are helped.

    Returns:
        The statistics of all; and of those that were helped, how many tokens they had seen themselves.
    """
    families: dict[str, list[str]] = {}
    for layer in layers:
        if layer.siblings:
            families.setdefault(layer.siblings, []).append(layer.name)
    result, helped = dict(statistics), {}
    for names in families.values():
        counts = {name: statistics[name].count if name in statistics else 0 for name in names}
        everything = sum(counts.values())
        few = {name: count for name, count in counts.items() if count < max(minimum, 1) and count < everything}
        if few:
            reached = [statistics[name] for name, count in counts.items() if count]
            total = InputStatistics(reached[0].needs)
            for part in reached:
                total.merge(part)
            result.update(dict.fromkeys(few, total))
            helped.update(few)
    return result, helped
