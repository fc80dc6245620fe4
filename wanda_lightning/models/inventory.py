"""What a walk finds: units of layers to prune, and the matrices that are left, each with its reason."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from wanda_lightning.models.layers import Layer

_USUAL = ("adapter", "embedding", "output head", "router", "stem", "tied to ")  # starts of reasons that surprise nobody
_ENOUGH = 0.8  # of the weights that a user would think pruned


@dataclass(frozen=True)
class Unit:
    """Where calibration batches stop: a block, a layer, or (module None) the model as a whole."""

    name: str
    module: nn.Module | None
    layers: tuple[Layer, ...]


@dataclass(frozen=True)
class Skipped:
    """A matrix that is left as it is."""

    name: str
    shape: tuple[int, ...]
    reason: str
    unprunable: bool = False  # integer or packed weights: the user must decide, see `PruningConfig`
    by_user: bool = False  # left out by `skip` or `only`
    why_not: bool = False  # a layer that the pattern does not fit

    @property
    def is_a_surprise(self) -> bool:
        """Whether a user might have thought it pruned."""
        return not self.by_user and not self.reason.startswith(_USUAL)


@dataclass(frozen=True)
class Inventory:
    """Every matrix of a model: to be pruned, in units, or skipped with a reason."""

    units: tuple[Unit, ...]
    skipped: tuple[Skipped, ...]

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All layers to be pruned, in walk order."""
        return tuple(layer for unit in self.units for layer in unit.layers)

    @property
    def misfits(self) -> tuple[Skipped, ...]:
        """Layers that would be pruned if the pattern fitted them, the largest first."""
        misfits = (matrix for matrix in self.skipped if matrix.why_not)
        return tuple(sorted(misfits, key=lambda matrix: -math.prod(matrix.shape)))


def left_by_pattern(found: Inventory) -> str | None:
    """Says it where there are layers that the pattern does not fit."""
    if not (misfits := found.misfits):
        return None
    return (
        f"the pattern does not fit {len(misfits)} layers, {misfits[0].name} largest ({misfits[0].reason}): left dense"
    )


def low_coverage(found: Inventory, dense: Mapping[str, str] = {}) -> str | None:
    """Says it where much is not pruned that is no embedding, stem or head and that nobody asked to leave out.

    Args:
        found: What was found.
        dense: Layers that were left dense all the same, with the reasons.
    """
    left = [(s.reason, s.name, math.prod(s.shape)) for s in found.skipped if s.is_a_surprise]
    left += [(dense[layer.name], layer.name, layer.size) for layer in found.layers if layer.name in dense]
    pruned = sum(layer.size for layer in found.layers if layer.name not in dense)
    total = pruned + sum(size for _, _, size in left)
    if pruned >= _ENOUGH * total:
        return None
    alike: dict[str, list[tuple[str, int]]] = {}
    for reason, name, size in left:
        alike.setdefault(reason, []).append((name, size))
    largest = sorted(alike.items(), key=lambda item: -sum(size for _, size in item[1]))[:3]
    texts = []
    for reason, matrices in largest:
        more = f" and {len(matrices) - 1} more" if len(matrices) > 1 else ""
        texts.append(f"{matrices[0][0]}{more}, {sum(size for _, size in matrices):,} weights: {reason}")
    share = f"{pruned / total:.0%} of the weights besides embeddings, stem and head"
    return f"only {share} are in pruned layers; left out are most of all {'; '.join(texts)}"
