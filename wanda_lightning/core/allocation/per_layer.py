"""Sparsities that the user gives for layers by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from wanda_lightning.common.checks import Number
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.layer_names import matches, refuse_unmatched
from wanda_lightning.core.allocation.allocation import (
    Allocation,
    Layers,
    Sparsities,
    match_target,
    total_size,
)

_OPTION = "PerLayer pattern"
_SPARSITY = Number(minimum=0, below=1)
_AS_PRINTED = 1e-4  # accept a mean with the four digits that the error message shows


class _Given(NamedTuple):
    """The layers with a given sparsity, and what remains for the others."""

    sparsities: Sparsities
    zeros: float  # number of weights that these sparsities make zero
    other_size: int  # number of weights of the other layers


@dataclass(frozen=True)
class PerLayer(Allocation):
    """Given sparsities for some layers, and one sparsity for all others that makes the mean the target.

    The given sparsities are final: a stage of a schedule takes the same fraction of them as of the target. If several
    patterns match a layer, the first one counts. With N:M, a layer gets the N nearest to its sparsity; 0 leaves it
    dense.

    Attributes:
        sparsities: By layer name, glob (with everything inside) or `re:` expression. Stored as a tuple of pairs.

    Example:
        >>> PerLayer({"*.mlp.*": 0.6, "blocks.0": 0.2})
        PerLayer(sparsities=(('*.mlp.*', 0.6), ('blocks.0', 0.2)))
    """

    sparsities: Mapping[str, float] | tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        pairs = tuple(dict(self.sparsities).items())
        for pattern, sparsity in pairs:
            if sparsity not in _SPARSITY:
                raise UserError(
                    f"sparsity of {pattern!r} in PerLayer must be {_SPARSITY}, but it is {sparsity!r}."
                )
        object.__setattr__(self, "sparsities", pairs)

    def check(self, layers: Layers, sparsity: float) -> None:
        """Refuse patterns that match no layer, and a target that the other layers cannot reach."""
        names = [layer.name for layer in layers]
        for pattern in dict(self.sparsities):
            refuse_unmatched(
                [pattern], names, _OPTION, "pruned layer that no earlier pattern matches"
            )
            names = [name for name in names if not matches(name, pattern, _OPTION)]

        given = self._given(layers)
        size = total_size(layers)
        lowest = given.zeros / size
        highest = (given.zeros + given.other_size) / size
        if not _is_reachable(sparsity, lowest, highest):
            raise UserError(
                f"sparsity must be from {lowest:.4f} to {highest:.4f} with this PerLayer, whose layers have a fraction "
                f"{1 - given.other_size / size:.4f} of the weights, but it is {sparsity:g}. Give another sparsity, or "
                "other values in PerLayer."
            )

    def scaled(self, fraction: float) -> PerLayer:
        """Scale every sparsity."""
        return PerLayer(
            {pattern: sparsity * fraction for pattern, sparsity in dict(self.sparsities).items()}
        )

    def __call__(self, layers: Layers, sparsity: float) -> Sparsities:
        """Give the other layers one sparsity that makes the mean the target."""
        given = self._given(layers)
        missing = sparsity * total_size(layers) - given.zeros
        remaining = missing / given.other_size if given.other_size else 0.0
        wanted = {layer.name: given.sparsities.get(layer.name, remaining) for layer in layers}
        return match_target(layers, wanted, sparsity, fixed=given.sparsities)

    def _given(self, layers: Layers) -> _Given:
        sparsities = {}
        # In reverse order, since the first pattern that matches a layer counts.
        for pattern, sparsity in reversed(dict(self.sparsities).items()):
            for layer in layers:
                if matches(layer.name, pattern, _OPTION):
                    sparsities[layer.name] = sparsity

        named = [layer for layer in layers if layer.name in sparsities]
        zeros = math.fsum(sparsities[layer.name] * layer.size for layer in named)
        return _Given(sparsities, zeros, total_size(layers) - total_size(named))


def _is_reachable(sparsity: float, lowest: float, highest: float) -> bool:
    if lowest == highest:  # all layers have a given sparsity
        return abs(sparsity - lowest) <= _AS_PRINTED
    return lowest - 1e-9 <= sparsity < highest
