"""float64, where a device has it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

WITHOUT_FLOAT64 = {"mps"}


def widest(tensor: Tensor) -> Tensor:
    """Return a tensor in float64, on the CPU if its device has no float64."""
    return (tensor.cpu() if tensor.device.type in WITHOUT_FLOAT64 else tensor).double()
