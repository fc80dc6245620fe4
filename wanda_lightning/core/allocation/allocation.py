"""The interface of allocations, what they see of a layer, the simplest one, and how all of them meet the target."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar, NamedTuple

from wanda_lightning.core.patterns import Structured
from wanda_lightning.core.statistics import GradientStatistics, InputStatistics
from wanda_lightning.core.types import PerUnit, Weight


@dataclass(frozen=True)
class DenseLayer:
    """Description of a layer of the dense model for an allocation."""

    name: str
    block: str  # that contains the layer, or the name of the layer if no block does
    size: int  # number of weights
    sparsity_steps: (
        int  # number of equal steps in which the pattern can raise the sparsity from 0 to 1
    )
    load: Callable[[], Weight]  # returns the weight; `read` calls it
    inputs: InputStatistics = field(default_factory=InputStatistics)  # that the allocation needs
    gradients: GradientStatistics | None = None  # if the allocation reads them
    # Empty until it is read.
    _zeros: list[int] = field(default_factory=list, init=False, repr=False, compare=False)

    def read(self) -> Weight:
        """Return the weight, which is not kept in memory."""
        weight = self.load()
        if not self._zeros:  # counted now, since the weight may have to come from disk each time
            self._zeros.append(int((weight == 0).count_nonzero()))
        return weight

    @property
    def zeros(self) -> int:
        """Number of weights that are zero before pruning; they stay zero."""
        if not self._zeros:
            self.read()
        return self._zeros[0]


@dataclass(frozen=True)
class UnitLayer:
    """Description of a layer whose inputs are hidden units for an allocation."""

    name: str
    kind: str  # layers of one kind differ in nothing but their place in the model
    width: int  # number of units
    scores: PerUnit | None = None  # of the units, if the allocation reads gradients
    cost: float = 1.0  # of a unit, relative to the mean over all units of the model


class GradientLimit(NamedTuple):
    """The first `samples` samples, and more until there are at least `predictions` predictions."""

    samples: int | None = None  # the first ones; None for all
    predictions: int = 0  # of tokens or of images


class Allocation(ABC):
    """Distributes the target sparsity over the layers.

    Attributes:
        needs: The input statistics of the dense model that it reads.
        reads_gradients: Whether it reads gradients of the dense model.
        fits_units: Whether it can distribute hidden units.
        cost: What it counts for a hidden unit, see `Fisher`.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    reads_gradients: ClassVar[bool] = False
    fits_units: ClassVar[bool] = False
    cost: str = "units"

    @property
    def gradient_limit(self) -> GradientLimit:
        """The number of calibration samples, over all processes, that get a backward pass."""
        return GradientLimit()

    def check(self, layers: Sequence[DenseLayer], sparsity: float) -> None:  # noqa: B027  # most fit every model
        """Raise a ValueError for layers whose names or sizes do not fit; weights are not read."""

    def scaled(self, fraction: float) -> Allocation:
        """Return the allocation for a stage of a schedule that has this fraction of the final sparsities."""
        return self

    def limits(self, sparsity: float) -> tuple[float, float] | None:
        """Return the least and the most sparsity that a layer can get for a target; None if there are no limits."""
        return None

    @abstractmethod
    def __call__(self, layers: Sequence[DenseLayer], sparsity: float) -> dict[str, float]:
        """Return the sparsity of each layer, by name, in [0, 1)."""

    def of_units(
        self, layers: Sequence[UnitLayer], sparsity: float, pattern: Structured
    ) -> dict[str, float]:
        """Return the fraction of the hidden units of each layer that become zero, if `fits_units`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Uniform(Allocation):
    """The same sparsity for every layer."""

    fits_units: ClassVar[bool] = True

    def __call__(self, layers: Sequence[DenseLayer], sparsity: float) -> dict[str, float]:
        """Give every layer the target."""
        return {layer.name: sparsity for layer in layers}

    def of_units(
        self, layers: Sequence[UnitLayer], sparsity: float, pattern: Structured
    ) -> dict[str, float]:
        """Give all layers of a kind one fraction that leaves whole units of each, so that one number describes them.

        If the widths have no such fraction within 0.05 of the target, each is rounded on its own.
        """
        widths: dict[str, list[int]] = {}
        for layer in layers:
            widths.setdefault(layer.kind, []).append(layer.width)
        found: dict[str, float] = {}
        for layer in layers:
            # This many steps of one unit, or more, fit into each width.
            common = math.gcd(*widths[layer.kind])
            fraction = 1 - pattern.kept(common, sparsity) / common
            found[layer.name] = fraction if abs(fraction - sparsity) <= 0.05 else sparsity
        return found


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
            layer.name: _sparsity_of(
                max(steps[layer.name], at_least[layer.name]), layer.sparsity_steps
            )
            for layer in layers
        }
    if len(set(wanted.values())) == 1:
        return dict.fromkeys(present, sparsity)

    def shifted(amount: float) -> dict[str, float]:
        free = {name: value + amount for name, value in wanted.items()} | dict(fixed)
        return {
            layer.name: max(present[layer.name], min(free[layer.name], _maximum(layer)))
            for layer in layers
        }

    low = -max(wanted.values())
    high = 1 - min(wanted.values())  # all layers at their minimum, all at their maximum
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


def _round(
    layers: Sequence[DenseLayer], sparsities: Mapping[str, float], target: float
) -> dict[str, float]:
    """Round all sparsities down to a step of the pattern, then those with the largest remainders up to the target."""
    steps = {layer.name: _whole_steps(layer, sparsities[layer.name]) for layer in layers}
    remainders = {
        layer.name: sparsities[layer.name] * layer.sparsity_steps - steps[layer.name]
        for layer in layers
    }
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
    return math.fsum(values[layer.name] * layer.size for layer in layers) / sum(
        layer.size for layer in layers
    )
