"""Blocks or layers, as that which is compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from wanda_lightning.core.allocation.base import Allocation, DenseLayer

Per = Literal["block", "layer"]


def unit_range(values: Mapping[str, float]) -> dict[str, float]:
    """The smallest becomes 0, the largest 1; all 0 where they are equal."""
    low, high = min(values.values()), max(values.values())
    return {name: (value - low) / (high - low) if high > low else 0.0 for name, value in values.items()}


def group_of(layer: DenseLayer, per: Per) -> str:
    """That in which a layer is."""
    return layer.block if per == "block" else layer.name


def groups_of(layers: Sequence[DenseLayer], per: Per) -> dict[str, list[DenseLayer]]:
    """The layers of each."""
    groups: dict[str, list[DenseLayer]] = {}
    for layer in layers:
        groups.setdefault(group_of(layer, per), []).append(layer)
    return groups


def refuse_unknown(per: str) -> None:
    """Refuse what is neither.

    Raises:
        ValueError: If it is.
    """
    if per not in get_args(Per):
        raise ValueError(f"an allocation compares per 'block' or per 'layer', but per={per!r} was given")


def refuse_one_group(allocation: Allocation, layers: Sequence[DenseLayer], per: Per) -> None:
    """Refuse a model that has nothing to compare.

    Raises:
        ValueError: If there is only one.
    """
    groups = groups_of(layers, per)
    if len(groups) == 1:
        other = f"{type(allocation).__name__}(per='layer') or " if per == "block" and len(layers) > 1 else ""
        raise ValueError(
            f"{allocation} compares {per}s with each other, but the model has one, {next(iter(groups))}. "
            f"Use allocation={other}Uniform()."
        )
