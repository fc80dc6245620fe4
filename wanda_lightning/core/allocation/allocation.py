"""The interface of allocations, what they see of a layer, and the simplest one."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

from wanda_lightning.core.patterns import Structured
from wanda_lightning.core.statistics import GradientStatistics, InputStatistics
from wanda_lightning.core.types import PerUnit, Weight

Per = Literal["block", "layer"]
PER = ("block", "layer")


@dataclass(frozen=True)
class DenseLayer:
    """Description of a layer of the dense model for an allocation."""

    name: str
    block: str  # that contains the layer, or the name of the layer if no block does
    size: int  # number of weights
    sparsity_steps: int  # number of equal steps in which the pattern can raise the sparsity from 0 to 1
    load: Callable[[], Weight]  # returns the weight; `read` calls it
    inputs: InputStatistics = field(default_factory=InputStatistics)  # that the allocation needs
    gradients: GradientStatistics | None = None  # if the allocation reads them
    _zeros: list[int] = field(default_factory=list, init=False, repr=False, compare=False)  # empty until it is read

    def group(self, per: Per) -> str:
        """Return the name of what an allocation compares: the block of the layer, or the layer itself."""
        return self.block if per == "block" else self.name

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


class GradientLimit(NamedTuple):
    """The first `samples` samples, and more until there are at least `predictions` predictions."""

    samples: int | None = None  # the first ones; None for all
    predictions: int = 0  # of tokens or of images


class Allocation(ABC):
    """Distributes the target sparsity over the layers.

    Attributes:
        needs: The input statistics of the dense model that it reads.
        reads_gradients: Whether it reads gradients of the dense model.
        reads_weights: Whether it reads whole layers, which the processes gather if each holds only some of the rows.
        prunes_units: Whether it can distribute hidden units.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    reads_gradients: ClassVar[bool] = False
    reads_weights: ClassVar[bool] = True
    prunes_units: ClassVar[bool] = False

    @property
    def gradient_limit(self) -> GradientLimit:
        """The number of calibration samples, over all processes, that get a backward pass."""
        return GradientLimit()

    def check(self, layers: Sequence[DenseLayer], sparsity: float) -> None:  # noqa: B027  # most fit every model
        """Raise a ValueError for layers whose names or sizes do not fit; weights are not read."""

    def scaled(self, fraction: float) -> Allocation:
        """Return the allocation for a stage of a schedule that has this fraction of the final sparsities."""
        return self

    @abstractmethod
    def __call__(self, layers: Sequence[DenseLayer], sparsity: float) -> dict[str, float]:
        """Return the sparsity of each layer, by name, in [0, 1)."""

    def of_units(self, layers: Sequence[UnitLayer], sparsity: float, pattern: Structured) -> dict[str, float]:
        """Return the fraction of the hidden units of each layer that become zero, if `prunes_units`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Uniform(Allocation):
    """The same sparsity for every layer."""

    reads_weights: ClassVar[bool] = False
    prunes_units: ClassVar[bool] = True

    def __call__(self, layers: Sequence[DenseLayer], sparsity: float) -> dict[str, float]:
        """Give every layer the target."""
        return {layer.name: sparsity for layer in layers}

    def of_units(self, layers: Sequence[UnitLayer], sparsity: float, pattern: Structured) -> dict[str, float]:
        """Give all layers of a kind one fraction that leaves whole units of each, so that one number describes them.

        If the widths have no such fraction within 0.05 of the target, each is rounded on its own.
        """
        widths: dict[str, list[int]] = {}
        for layer in layers:
            widths.setdefault(layer.kind, []).append(layer.width)
        found: dict[str, float] = {}
        for layer in layers:
            common = math.gcd(*widths[layer.kind])  # this many steps of one unit, or more, fit into each width
            fraction = 1 - pattern.kept(common, sparsity) / common
            found[layer.name] = fraction if abs(fraction - sparsity) <= 0.05 else sparsity
        return found


def groups_of(layers: Sequence[DenseLayer], per: Per) -> dict[str, list[DenseLayer]]:
    """Return the layers of each block, by its name, or each layer on its own."""
    groups: dict[str, list[DenseLayer]] = {}
    for layer in layers:
        groups.setdefault(layer.group(per), []).append(layer)
    return groups


def unit_range(values: Mapping[str, float]) -> dict[str, float]:
    """Map the values linearly to [0, 1], the smallest to 0 and the largest to 1; if all are equal, to 0."""
    low, high = min(values.values()), max(values.values())
    return {name: (value - low) / (high - low) if high > low else 0.0 for name, value in values.items()}
