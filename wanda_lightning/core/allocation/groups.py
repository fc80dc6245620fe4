"""The groups that an allocation compares with each other: blocks, or single layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from wanda_lightning.common.errors import UserError
from wanda_lightning.core.allocation.allocation import Allocation, DenseLayer

Per = Literal["block", "layer"]
PER = ("block", "layer")


def unit_range(values: Mapping[str, float]) -> dict[str, float]:
    """Map the values linearly to [0, 1], the smallest to 0 and the largest to 1; if all are equal, to 0."""
    low, high = min(values.values()), max(values.values())
    return {name: (value - low) / (high - low) if high > low else 0.0 for name, value in values.items()}


def group_of(layer: DenseLayer, per: Per) -> str:
    """Return the name of a layer's group."""
    return layer.block if per == "block" else layer.name


def groups_of(layers: Sequence[DenseLayer], per: Per) -> dict[str, list[DenseLayer]]:
    """Return the layers of each group, by its name."""
    groups: dict[str, list[DenseLayer]] = {}
    for layer in layers:
        groups.setdefault(group_of(layer, per), []).append(layer)
    return groups


def refuse_one_group(allocation: Allocation, layers: Sequence[DenseLayer], per: Per) -> None:
    """Raise a ValueError for a model with a single group, which has nothing to compare."""
    groups = groups_of(layers, per)
    if len(groups) == 1:
        other = f"{type(allocation).__name__}(per='layer') or " if per == "block" and len(layers) > 1 else ""
        raise UserError(
            f"allocation={allocation} compares {per}s with each other, but the model has one, {next(iter(groups))}. "
            f"Use allocation={other}Uniform()."
        )
