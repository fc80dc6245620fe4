"""Allocations give each layer its sparsity, so that the parameter-weighted mean is the target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@runtime_checkable
class Allocation(Protocol):
    """How the target sparsity is spread over the layers."""

    def __call__(self, sizes: Mapping[str, int], sparsity: float) -> dict[str, float]:
        """Give each layer, named with its number of weights, a sparsity in [0, 1)."""
        ...


@dataclass(frozen=True)
class Uniform:
    """The same sparsity for every layer."""

    def __call__(self, sizes: Mapping[str, int], sparsity: float) -> dict[str, float]:
        """Give every layer the target itself."""
        return dict.fromkeys(sizes, sparsity)


ALLOCATIONS: dict[str, type[Allocation]] = {"uniform": Uniform}
