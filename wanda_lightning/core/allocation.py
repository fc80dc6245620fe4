"""Allocations give each layer its sparsity, so that the parameter-weighted mean is the target."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass


class Allocation(ABC):
    """How the target sparsity is spread over the layers."""

    @abstractmethod
    def __call__(self, sizes: Mapping[str, int], sparsity: float) -> dict[str, float]:
        """Give each layer, named with its number of weights, a sparsity in [0, 1)."""


@dataclass(frozen=True)
class Uniform(Allocation):
    """The same sparsity for every layer."""

    def __call__(self, sizes: Mapping[str, int], sparsity: float) -> dict[str, float]:
        """Give every layer the target itself."""
        return dict.fromkeys(sizes, sparsity)


ALLOCATIONS: dict[str, type[Allocation]] = {"uniform": Uniform}
