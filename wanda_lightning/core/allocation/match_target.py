"""From how layers should differ to sparsities with the right mean that the pattern can have."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from wanda_lightning.core.allocation.base import DenseLayer


def match_target(
    layers: Sequence[DenseLayer],
    wanted: Mapping[str, float],
    sparsity: float,
    fixed: Mapping[str, float] = MappingProxyType({}),
) -> dict[str, float]:
    """Sparsities that differ as wanted, as near to the target in the parameter-weighted mean as the pattern allows.

    All are moved by one amount. No layer gets less than it has zeros, for these stay; so a model that has as many as
    asked for gets no more, and pruning twice changes nothing. None loses all weights of a row or of an N:M group.

    Args:
        layers: All that are pruned.
        wanted: A number for each, of which only the differences count. Where there are none, all get the target.
        sparsity: The target.
        fixed: Layers that are not moved.
    """
    present = {layer.name: min(layer.zeros / layer.size, _most(layer)) for layer in layers}
    missing = sparsity * sum(layer.size for layer in layers) - sum(layer.zeros for layer in layers)
    if missing <= max(layer.size / layer.sparsity_steps for layer in layers) / 2:
        steps = {layer.name: round(present[layer.name] * layer.sparsity_steps) for layer in layers}
        at_least = {layer.name: _whole_steps(layer, fixed.get(layer.name, 0.0)) for layer in layers}
        return {
            layer.name: _level(max(steps[layer.name], at_least[layer.name]), layer.sparsity_steps) for layer in layers
        }
    if len(set(wanted.values())) == 1:
        return dict.fromkeys(present, sparsity)

    def moved(amount: float) -> dict[str, float]:
        free = {name: value + amount for name, value in wanted.items()} | dict(fixed)
        return {layer.name: max(present[layer.name], min(free[layer.name], _most(layer))) for layer in layers}

    low, high = -max(wanted.values()), 1 - min(wanted.values())  # all at their least, all at their most
    amount = sparsity - mean_of(layers, wanted)
    for _ in range(_HALVINGS):
        excess = mean_of(layers, moved(amount)) - sparsity
        if abs(excess) < _EXACT:
            break
        low, high = (low, amount) if excess > 0 else (amount, high)
        amount = (low + high) / 2
    return _on_levels(layers, moved(amount), sparsity)


_HALVINGS = 60
_EXACT = 1e-12


def _on_levels(layers: Sequence[DenseLayer], sparsities: Mapping[str, float], target: float) -> dict[str, float]:
    """Round each to a level of its pattern, so that the mean stays: down, then up by the largest remainders."""
    steps = {layer.name: _whole_steps(layer, sparsities[layer.name]) for layer in layers}
    remainders = {layer.name: sparsities[layer.name] * layer.sparsity_steps - steps[layer.name] for layer in layers}
    missing = target * sum(layer.size for layer in layers)
    missing -= math.fsum(steps[layer.name] * layer.size / layer.sparsity_steps for layer in layers)
    for layer in sorted(layers, key=lambda layer: -remainders[layer.name]):
        step = layer.size / layer.sparsity_steps
        if remainders[layer.name] > _ROUNDING and step < 2 * missing:
            steps[layer.name] += 1
            missing -= step
    return {layer.name: _level(steps[layer.name], layer.sparsity_steps) for layer in layers}


_ROUNDING = 1e-7  # of steps


def _whole_steps(layer: DenseLayer, sparsity: float) -> int:
    return int(min(sparsity, _most(layer)) * layer.sparsity_steps + _ROUNDING)


def _level(step: int, levels: int) -> float:
    # 1 / 49 * 49 is less than 1, and patterns round down.
    sparsity = step / levels
    return sparsity if int(levels * sparsity) == step else math.nextafter(sparsity, 1.0)


def _most(layer: DenseLayer) -> float:
    """The sparsity that leaves one weight in every group."""
    return 1 - 1 / layer.sparsity_steps


def mean_of(layers: Sequence[DenseLayer], values: Mapping[str, float]) -> float:
    """The parameter-weighted mean."""
    return math.fsum(values[layer.name] * layer.size for layer in layers) / sum(layer.size for layer in layers)
