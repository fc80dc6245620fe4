"""Random numbers from a seed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw the random numbers of the CPU and of a device from a seed; restore their states at the end."""
    import torch

    on_cpu = device.type == "cpu"
    with torch.random.fork_rng(devices=[] if on_cpu else [device]):
        (torch.default_generator if on_cpu else torch).manual_seed(seed)  # torch seeds all devices
        yield
