"""The interface of allocations, the descriptions of layers that they get, `Uniform`, and how all meet the target."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import ClassVar, NamedTuple

from wanda_lightning.core.patterns import Structured
from wanda_lightning.core.statistics import GradientStatistics, InputStatistics
from wanda_lightning.core.types import PerUnit, Weight

Sparsities = dict[str, float]  # by the name of a layer


@dataclass(frozen=True)
class DenseLayer:
    """Description of a layer of the dense model for an allocation."""

    name: str
    block: str  # the block that contains the layer, or the name of the layer if no block does
    size: int  # number of weights
    sparsity_steps: int  # in how many equal steps the pattern can raise the sparsity from 0 to 1
    load: Callable[[], Weight]  # returns the weight; `read` calls it
    inputs: InputStatistics = field(default_factory=InputStatistics)  # the allocation's `needs`
    gradients: GradientStatistics | None = None  # if the allocation reads them

    def read(self) -> Weight:
        """Return the weight, which is not kept in memory."""
        weight = self.load()
        # Zeros are counted now, because loading the weight again for it may mean reading a disk.
        if "zeros" not in vars(self):
            vars(self)["zeros"] = int((weight == 0).count_nonzero())
        return weight

    @cached_property
    def zeros(self) -> int:
        """Number of weights that are zero before pruning; they stay zero."""
        self.read()
        return self.zeros


Layers = Sequence[DenseLayer]


@dataclass(frozen=True)
class UnitLayer:
    """Description of a layer whose inputs are hidden units for an allocation."""

    name: str
    kind: str  # layers of one kind differ in nothing but their place in the model
    width: int  # number of units
    scores: PerUnit | None = None  # if the allocation reads gradients
    cost: float = 1.0  # cost of a unit, relative to the mean over all units of the model


UnitLayers = Sequence[UnitLayer]


class GradientLimit(NamedTuple):
    """The first `samples` samples, and more until there are at least `predictions` predictions."""

    samples: int | None = None  # None for all
    predictions: int = 0  # a window of text has one for each token, an image a single one


class Allocation(ABC):
    """Distributes the target sparsity over the layers.

    Attributes:
        needs: The input statistics of the dense model that it reads.
        reads_gradients: Whether it reads gradients of the dense model.
        cost: What a hidden unit costs, see `Fisher`.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    reads_gradients: ClassVar[bool] = False
    cost: str = "units"

    @property
    def gradient_limit(self) -> GradientLimit:
        """The number of calibration samples, over all processes, that get a backward pass."""
        return GradientLimit()

    def check(self, layers: Layers, sparsity: float) -> None:  # noqa: B027  # most fit every model
        """Raise a ValueError for layers whose names or sizes do not fit; weights are not read."""

    def scaled(self, fraction: float) -> Allocation:
        """Return the allocation for a stage of a schedule that has this fraction of the final sparsities."""
        return self

    @abstractmethod
    def __call__(self, layers: Layers, sparsity: float) -> Sparsities:
        """Return the sparsity of each layer, by name, in [0, 1)."""

    def of_units(self, layers: UnitLayers, sparsity: float, pattern: Structured) -> Sparsities:
        """Return the fraction of the hidden units of each layer that become zero."""
        raise NotImplementedError


@dataclass(frozen=True)
class Uniform(Allocation):
    """The same sparsity for every layer."""

    def __call__(self, layers: Layers, sparsity: float) -> Sparsities:
        """Give every layer the target."""
        return {layer.name: sparsity for layer in layers}

    def of_units(self, layers: UnitLayers, sparsity: float, pattern: Structured) -> Sparsities:
        """Give all layers of a kind one fraction that leaves whole units of each, so that one number describes them.

        If the widths have no such fraction within 0.05 of the target, each is rounded on its own.
        """
        # A fraction that leaves whole units of the common divisor leaves whole units of its multiples.
        divisors: dict[str, int] = {}
        for layer in layers:
            divisors[layer.kind] = math.gcd(divisors.get(layer.kind, 0), layer.width)

        fractions = {}
        for layer in layers:
            common = divisors[layer.kind]
            fraction = 1 - pattern.kept(common, sparsity) / common
            is_near = abs(fraction - sparsity) <= 0.05
            fractions[layer.name] = fraction if is_near else sparsity
        return fractions


_HALVINGS = 60
_EXACT = 1e-12
_ROUNDING = 1e-7  # of steps


def match_target(
    layers: Layers,
    wanted: Mapping[str, float],
    sparsity: float,
    fixed: Mapping[str, float] = MappingProxyType({}),
) -> Sparsities:
    """Return sparsities that differ as wanted, with a weighted mean as near to the target as the steps allow.

    All sparsities are shifted by the same amount. Zeros stay zero, so no layer gets a sparsity below its present one.
    A model that has enough zeros therefore gets no more, and pruning twice changes nothing. At least one weight of
    each row or N:M group survives. Only the differences in `wanted` matter; if all are equal, all layers get the
    target. The layers in `fixed` have these sparsities and are not shifted.
    """
    present = {layer.name: min(layer.zeros / layer.size, _maximum(layer)) for layer in layers}
    missing = sparsity * total_size(layers) - sum(layer.zeros for layer in layers)
    if missing <= max(map(_step_size, layers)) / 2:  # the model has enough zeros
        steps = {}
        for layer in layers:
            name = layer.name
            fixed_steps = _whole_steps(layer, fixed.get(name, 0.0))
            steps[name] = max(round(present[name] * layer.sparsity_steps), fixed_steps)
        return _sparsities(layers, steps)
    if len(set(wanted.values())) == 1:
        return dict.fromkeys(present, sparsity)

    def shifted(amount: float) -> Sparsities:
        sparsities = {}
        for layer in layers:
            name = layer.name
            free = fixed.get(name, wanted[name] + amount)
            sparsities[name] = max(present[name], min(free, _maximum(layer)))
        return sparsities

    # Bisect between all layers at their minimum and all at their maximum.
    low = -max(wanted.values())
    high = 1 - min(wanted.values())
    amount = sparsity - mean_of(layers, wanted)  # exact unless a layer has reached a bound
    for _ in range(_HALVINGS):
        excess = mean_of(layers, shifted(amount)) - sparsity
        if abs(excess) < _EXACT:
            break
        if excess > 0:
            high = amount
        else:
            low = amount
        amount = (low + high) / 2
    return _round(layers, shifted(amount), sparsity)


def _round(layers: Layers, sparsities: Sparsities, target: float) -> Sparsities:
    """Round all sparsities down to a step of the pattern, then those with the largest remainders up to the target."""
    steps = {layer.name: _whole_steps(layer, sparsities[layer.name]) for layer in layers}
    rounded = math.fsum(steps[layer.name] * layer.size / layer.sparsity_steps for layer in layers)
    missing = target * total_size(layers) - rounded

    def remainder(layer: DenseLayer) -> float:
        return sparsities[layer.name] * layer.sparsity_steps - steps[layer.name]

    for layer in sorted(layers, key=remainder, reverse=True):
        step_size = _step_size(layer)
        if remainder(layer) > _ROUNDING and step_size < 2 * missing:
            steps[layer.name] += 1
            missing -= step_size
    return _sparsities(layers, steps)


def _step_size(layer: DenseLayer) -> float:
    """Return how many weights of a layer become zero in each step."""
    return layer.size / layer.sparsity_steps


def _whole_steps(layer: DenseLayer, sparsity: float) -> int:
    return int(min(sparsity, _maximum(layer)) * layer.sparsity_steps + _ROUNDING)


def _sparsities(layers: Layers, steps: dict[str, int]) -> Sparsities:
    """Return the sparsity of each layer after whole steps."""
    sparsities = {}
    for layer in layers:
        taken = steps[layer.name]
        sparsity = taken / layer.sparsity_steps
        # Patterns round down, and 1 / 49 * 49 is less than 1 in floating point.
        if int(layer.sparsity_steps * sparsity) != taken:
            sparsity = math.nextafter(sparsity, 1.0)
        sparsities[layer.name] = sparsity
    return sparsities


def _maximum(layer: DenseLayer) -> float:
    """Return the sparsity at which one weight of each group survives."""
    return 1 - 1 / layer.sparsity_steps


def total_size(layers: Iterable[DenseLayer]) -> int:
    """Return the number of weights of all layers."""
    return sum(layer.size for layer in layers)


def mean_of(layers: Layers, values: Mapping[str, float]) -> float:
    """Return the mean of the values, weighted by the number of weights."""
    return math.fsum(values[layer.name] * layer.size for layer in layers) / total_size(layers)
