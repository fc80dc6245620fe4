"""Sparsities by name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from wanda_lightning.core.allocation.base import Allocation, DenseLayer
from wanda_lightning.core.allocation.match_target import match_target
from wanda_lightning.core.name_patterns import matches, refuse_unmatched


@dataclass(frozen=True)
class PerLayer(Allocation):
    """The sparsities of some layers, given by name; the others share one, so that the mean is the target.

    The numbers are final sparsities: a schedule's earlier stages take the same share of them as of the target. Of
    patterns that match one layer the first counts. With N:M a layer gets an N near its number; 0 leaves it dense.

    Attributes:
        sparsities: By layer names, globs (with everything inside) or `re:` expressions. Kept as a tuple of pairs.

    Example:
        >>> PerLayer({"*.mlp.*": 0.6, "blocks.0": 0.2})
        PerLayer(sparsities=(('*.mlp.*', 0.6), ('blocks.0', 0.2)))
    """

    sparsities: Mapping[str, float] | tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        pairs = tuple(dict(self.sparsities).items())
        for pattern, sparsity in pairs:
            if not 0 <= sparsity < 1:
                raise ValueError(f"PerLayer gives {pattern!r} a sparsity of {sparsity}, but it is in [0, 1)")
        object.__setattr__(self, "sparsities", pairs)

    def check(self, layers: Sequence[DenseLayer], sparsity: float) -> None:
        """Refuse patterns that name nothing, and a target that the other layers cannot make up for."""
        names = [layer.name for layer in layers]
        patterns = list(dict(self.sparsities))
        refuse_unmatched(patterns, names, _OPTION, "pruned layer")
        effective = {self._pattern_of(name) for name in names}
        if hidden := [pattern for pattern in patterns if pattern not in effective]:
            raise ValueError(
                f"{_OPTION}={hidden[0]!r} names only layers that patterns before it name: the first that matches "
                "counts, so give it earlier, or leave it out"
            )
        given = self._given(layers)
        pruned = math.fsum(given[layer.name] * layer.size for layer in layers if layer.name in given)
        size, rest = sum(layer.size for layer in layers), sum(layer.size for layer in layers if layer.name not in given)
        if not rest:
            if abs(pruned / size - sparsity) > _AS_PRINTED:
                raise ValueError(
                    f"PerLayer names every layer, and their mean sparsity is {pruned / size:.4f}, but {sparsity:g} was "
                    f"asked for. Use sparsity={pruned / size:.4f}, or leave some layers to make up the difference."
                )
        elif not -1e-9 <= (wanted := (sparsity * size - pruned) / rest) < 1:
            raise ValueError(
                f"a mean sparsity of {sparsity:g} cannot be reached: PerLayer leaves {rest / size:.1%} of the weights, "
                f"which would need a sparsity of {wanted:.4f}. Use a sparsity from {pruned / size:.4f} to "
                f"below {(pruned + rest) / size:.4f}, or give other values."
            )

    def scaled(self, share: float) -> PerLayer:
        """The same share of each number."""
        return PerLayer({pattern: sparsity * share for pattern, sparsity in dict(self.sparsities).items()})

    def __call__(self, layers: Sequence[DenseLayer], sparsity: float) -> dict[str, float]:
        """Give what was given, and the rest what remains."""
        given = self._given(layers)
        rest = sum(layer.size for layer in layers if layer.name not in given)
        pruned = math.fsum(given[layer.name] * layer.size for layer in layers if layer.name in given)
        remaining = (sparsity * sum(layer.size for layer in layers) - pruned) / rest if rest else 0.0
        return match_target(
            layers, {layer.name: given.get(layer.name, remaining) for layer in layers}, sparsity, fixed=given
        )

    def _given(self, layers: Sequence[DenseLayer]) -> dict[str, float]:
        sparsities = dict(self.sparsities)
        named = {layer.name: self._pattern_of(layer.name) for layer in layers}
        return {name: sparsities[pattern] for name, pattern in named.items() if pattern is not None}

    def _pattern_of(self, name: str) -> str | None:
        return next((pattern for pattern in dict(self.sparsities) if matches(name, pattern, _OPTION)), None)


_OPTION = "PerLayer pattern"
_AS_PRINTED = 1e-4  # a mean that was clone_arguments from an error's four digits is the mean
