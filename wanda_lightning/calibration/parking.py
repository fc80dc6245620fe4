"""The activations of one batch while it waits at a unit: in memory, or wherever a subclass keeps them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Parking:
    """Keeps the activations of one batch in memory. The forward pass of the batch runs in this context."""

    def __enter__(self) -> Any:
        """Begin the forward pass."""
        return self

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        """End the forward pass."""

    def add(self, value: object) -> None:
        """Count the tensors within a value among the activations of the batch."""

    def offload(self) -> None:
        """Free memory until the batch, or a unit on its inputs, runs again."""

    def restore(self) -> None:
        """Bring the activations back into memory before the batch, or a unit on its inputs, runs."""


MakeParking = Callable[[], Parking]  # for one batch
