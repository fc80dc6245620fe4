"""Sparsities that the user gives for layers by name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from wanda_lightning.common.checks import Number
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.words import matches, refuse_unmatched
from wanda_lightning.core.allocation.allocation import Allocation, DenseLayer
from wanda_lightning.core.allocation.match_target import match_target

_OPTION = "PerLayer pattern"
_SPARSITY = Number(minimum=0, below=1)
_AS_PRINTED = 1e-4  # accept a mean with the four digits that the error message shows


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
        message = f"sparsities of PerLayer must map names of layers to sparsities, but they are {self.sparsities!r}."
        try:
            pairs = tuple(dict(self.sparsities).items())
        except (TypeError, ValueError) as error:
            raise UserError(message) from error
        if not all(isinstance(pattern, str) for pattern, _ in pairs):
            raise UserError(message)
        for pattern, sparsity in pairs:
            if not _SPARSITY.accepts(sparsity):
                raise UserError(f"sparsity of {pattern!r} in PerLayer must be {_SPARSITY}, but it is {sparsity!r}.")
        object.__setattr__(self, "sparsities", pairs)

    def check(self, layers: Sequence[DenseLayer], sparsity: float) -> None:
        """Refuse patterns that match no layer, and a target that the other layers cannot reach."""
        names = [layer.name for layer in layers]
        patterns = list(dict(self.sparsities))
        refuse_unmatched(patterns, names, _OPTION, "pruned layer")
        effective = {self._pattern_of(name) for name in names}
        if hidden := [pattern for pattern in patterns if pattern not in effective]:
            raise UserError(
                f"{_OPTION}={hidden[0]!r} matches only layers that earlier patterns match, and the first match counts. "
                "Give it earlier, or leave it out."
            )
        _, pruned, rest = self._given(layers)
        size = sum(layer.size for layer in layers)
        if not rest:
            if abs(pruned / size - sparsity) > _AS_PRINTED:
                raise UserError(
                    f"sparsity must be {pruned / size:.4f}, the mean of PerLayer, which names every layer, but it is "
                    f"{sparsity:g}. Give sparsity={pruned / size:.4f}, or leave some layers to make up the difference."
                )
        elif not -1e-9 <= (wanted := (sparsity * size - pruned) / rest) < 1:
            raise UserError(
                f"sparsity must be from {pruned / size:.4f} to below {(pruned + rest) / size:.4f} with this PerLayer, "
                f"but it is {sparsity:g}: the other {rest / size:.1%} of the weights would need a sparsity of "
                f"{wanted:.4f}. Give another sparsity, or other values in PerLayer."
            )

    def scaled(self, fraction: float) -> PerLayer:
        """Scale every sparsity."""
        return PerLayer({pattern: sparsity * fraction for pattern, sparsity in dict(self.sparsities).items()})

    def __call__(self, layers: Sequence[DenseLayer], sparsity: float) -> dict[str, float]:
        """Give the other layers one sparsity that makes the mean the target."""
        given, pruned, rest = self._given(layers)
        remaining = (sparsity * sum(layer.size for layer in layers) - pruned) / rest if rest else 0.0
        return match_target(
            layers, {layer.name: given.get(layer.name, remaining) for layer in layers}, sparsity, fixed=given
        )

    def _given(self, layers: Sequence[DenseLayer]) -> tuple[dict[str, float], float, int]:
        """Return the given sparsities by layer, how many zeros they make, and the size of the other layers."""
        sparsities = dict(self.sparsities)
        named = {layer.name: self._pattern_of(layer.name) for layer in layers}
        given = {name: sparsities[pattern] for name, pattern in named.items() if pattern is not None}
        pruned = math.fsum(given[layer.name] * layer.size for layer in layers if layer.name in given)
        return given, pruned, sum(layer.size for layer in layers if layer.name not in given)

    def _pattern_of(self, name: str) -> str | None:
        return next((pattern for pattern in dict(self.sparsities) if matches(name, pattern, _OPTION)), None)
