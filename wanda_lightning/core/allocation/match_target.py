"""Shift sparsities until their mean is the target, and round them to sparsities that the pattern can have."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from wanda_lightning.core.allocation.allocation import DenseLayer


def match_target(
    layers: Sequence[DenseLayer],
    wanted: Mapping[str, float],
    sparsity: float,
    fixed: Mapping[str, float] = MappingProxyType({}),
) -> dict[str, float]:
    """Return sparsities that differ as wanted, with a weighted mean as near to the target as the steps allow.

    All sparsities are shifted by the same amount. Zeros stay zero, so no layer gets a sparsity below its present one.
    A model that has enough zeros therefore gets no more, and pruning twice changes nothing. At least one weight of
    each row or N:M group survives. Only the differences in `wanted` matter; if all are equal, all layers get the
    target. The layers in `fixed` have these sparsities and are not shifted.
    """
    present = {layer.name: min(layer.zeros / layer.size, _maximum(layer)) for layer in layers}
    missing = sparsity * sum(layer.size for layer in layers) - sum(layer.zeros for layer in layers)
    if missing <= max(layer.size / layer.sparsity_steps for layer in layers) / 2:
        steps = {layer.name: round(present[layer.name] * layer.sparsity_steps) for layer in layers}
        at_least = {layer.name: _whole_steps(layer, fixed.get(layer.name, 0.0)) for layer in layers}
        return {
            layer.name: _sparsity_of(max(steps[layer.name], at_least[layer.name]), layer.sparsity_steps)
            for layer in layers
        }
    if len(set(wanted.values())) == 1:
        return dict.fromkeys(present, sparsity)

    def shifted(amount: float) -> dict[str, float]:
        free = {name: value + amount for name, value in wanted.items()} | dict(fixed)
        return {layer.name: max(present[layer.name], min(free[layer.name], _maximum(layer))) for layer in layers}

    low, high = -max(wanted.values()), 1 - min(wanted.values())  # all layers at their minimum, all at their maximum
    amount = sparsity - mean_of(layers, wanted)
    for _ in range(_HALVINGS):
        excess = mean_of(layers, shifted(amount)) - sparsity
        if abs(excess) < _EXACT:
            break
        low, high = (low, amount) if excess > 0 else (amount, high)
        amount = (low + high) / 2
    return _round(layers, shifted(amount), sparsity)


_HALVINGS = 60
_EXACT = 1e-12
_ROUNDING = 1e-7  # of steps


def _round(layers: Sequence[DenseLayer], sparsities: Mapping[str, float], target: float) -> dict[str, float]:
    """Round all sparsities down to a step of the pattern, then those with the largest remainders up to the target."""
    steps = {layer.name: _whole_steps(layer, sparsities[layer.name]) for layer in layers}
    remainders = {layer.name: sparsities[layer.name] * layer.sparsity_steps - steps[layer.name] for layer in layers}
    missing = target * sum(layer.size for layer in layers)
    missing -= math.fsum(steps[layer.name] * layer.size / layer.sparsity_steps for layer in layers)
    for layer in sorted(layers, key=lambda layer: -remainders[layer.name]):
        step = layer.size / layer.sparsity_steps
        if remainders[layer.name] > _ROUNDING and step < 2 * missing:
            steps[layer.name] += 1
            missing -= step
    return {layer.name: _sparsity_of(steps[layer.name], layer.sparsity_steps) for layer in layers}


def _whole_steps(layer: DenseLayer, sparsity: float) -> int:
    return int(min(sparsity, _maximum(layer)) * layer.sparsity_steps + _ROUNDING)


def _sparsity_of(step: int, steps: int) -> float:
    # Patterns round down, and 1 / 49 * 49 is less than 1 in floating point.
    sparsity = step / steps
    return sparsity if int(steps * sparsity) == step else math.nextafter(sparsity, 1.0)


def _maximum(layer: DenseLayer) -> float:
    """The sparsity at which one weight of each group survives."""
    return 1 - 1 / layer.sparsity_steps


def mean_of(layers: Sequence[DenseLayer], values: Mapping[str, float]) -> float:
    """Return the mean of the values, weighted by the number of weights."""
    return math.fsum(values[layer.name] * layer.size for layer in layers) / sum(layer.size for layer in layers)
