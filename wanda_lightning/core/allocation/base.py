"""What an allocation is, what it sees, and the plainest one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

from wanda_lightning.core.statistics import InputStatistics
from wanda_lightning.core.types import PerInput, Weight


@dataclass(frozen=True)
class DenseLayer:
    """A layer before it is pruned, as an allocation sees it.

    Attributes:
        name: Its name in the model.
        block: The repeated part of the model that it lies in; its own name where it lies in none.
        size: Number of weights.
        sparsity_steps: In how many equal steps the pattern can take its sparsity from 0 to 1.
        read: Gives the weight, which is not held.
        inputs: Statistics of the dense model, for an allocation that needs some.
        fisher: For one that reads gradients, of each input the sum over tokens of its square times the mean square of
            the gradients at the layer's outputs.
    """

    name: str
    block: str
    size: int
    sparsity_steps: int
    read: Callable[[], Weight]
    inputs: InputStatistics = field(default_factory=InputStatistics)
    fisher: PerInput | None = None

    @cached_property
    def zeros(self) -> int:
        """How many weights are zero already; they stay zero."""
        return int((self.read() == 0).count_nonzero())


class Allocation(ABC):
    """How the target sparsity is spread over the layers."""

    needs: ClassVar[frozenset[str]] = frozenset()  # statistics of the dense model
    reads_gradients: ClassVar[bool] = False  # of the dense model
    reads_weights: ClassVar[bool] = True  # of whole layers, so that no process can do with its rows

    @property
    def gradient_samples(self) -> int | None:
        """How many calibration samples of all processes together are passed backward; None for all."""
        return None

    def check(self, layers: Sequence[DenseLayer], sparsity: float) -> None:  # noqa: B027  # most fit every model
        """Refuse a model that the allocation does not fit, before weights or statistics are read.

        Raises:
            ValueError: If names, blocks or sizes of the layers make it impossible.
        """

    def scaled(self, share: float) -> Allocation:
        """For a stage of a schedule: gives each layer this share of what it gets in the end."""
        return self

    @abstractmethod
    def __call__(self, layers: Sequence[DenseLayer], sparsity: float) -> dict[str, float]:
        """Give each layer, by name, a sparsity in [0, 1)."""


@dataclass(frozen=True)
class Uniform(Allocation):
    """The same sparsity for every layer."""

    reads_weights: ClassVar[bool] = False

    def __call__(self, layers: Sequence[DenseLayer], sparsity: float) -> dict[str, float]:
        """Give every layer the target itself."""
        return {layer.name: sparsity for layer in layers}
