"""The interface of every allocation, what it sees of a layer, and the simplest one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

from wanda_lightning.core.statistics import GradientStatistics, InputStatistics
from wanda_lightning.core.types import Weight


@dataclass(frozen=True)
class DenseLayer:
    """What an allocation sees of a layer before it is pruned.

    Attributes:
        name: Name in the model.
        block: Name of the repeated part of the model that holds the layer; without one, the layer's own name.
        size: Number of weights.
        sparsity_steps: Number of equal steps in which the pattern can raise the sparsity from 0 to 1.
        read: Returns the weight, which is not kept in memory.
        inputs: Input statistics of the dense model, for an allocation that needs some.
        gradients: Gradients of the dense model, for an allocation that reads them.
    """

    name: str
    block: str
    size: int
    sparsity_steps: int
    read: Callable[[], Weight]
    inputs: InputStatistics = field(default_factory=InputStatistics)
    gradients: GradientStatistics | None = None

    @cached_property
    def zeros(self) -> int:
        """Number of weights that are zero already; they stay zero."""
        return int((self.read() == 0).count_nonzero())


class Allocation(ABC):
    """Distributes the target sparsity over the layers.

    Attributes:
        needs: The input statistics of the dense model that it reads.
        reads_gradients: Whether it reads gradients of the dense model.
        reads_weights: Whether it reads whole layers, so that a process that holds some rows cannot compute it.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    reads_gradients: ClassVar[bool] = False
    reads_weights: ClassVar[bool] = True

    @property
    def gradient_samples(self) -> int | None:
        """Number of calibration samples, of all processes together, that are passed backward; None for all."""
        return None

    def check(self, layers: Sequence[DenseLayer], sparsity: float) -> None:  # noqa: B027  # most fit every model
        """Refuse a model that the allocation does not fit, before weights or statistics are read.

        Raises:
            ValueError: If names, blocks or sizes of the layers make the allocation impossible.
        """

    def scaled(self, fraction: float) -> Allocation:
        """Return the allocation for a stage of a schedule that gives this fraction of the final sparsities."""
        return self

    @abstractmethod
    def __call__(self, layers: Sequence[DenseLayer], sparsity: float) -> dict[str, float]:
        """Return the sparsity of each layer, by name, in [0, 1)."""


@dataclass(frozen=True)
class Uniform(Allocation):
    """The same sparsity for every layer."""

    reads_weights: ClassVar[bool] = False

    def __call__(self, layers: Sequence[DenseLayer], sparsity: float) -> dict[str, float]:
        """Give every layer the target."""
        return {layer.name: sparsity for layer in layers}
