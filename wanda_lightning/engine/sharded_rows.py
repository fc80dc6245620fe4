"""The rows of a layer that FSDP2 divides over processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from wanda_lightning.core.selection import ALL_ROWS, Rows
from wanda_lightning.models import Layer
from wanda_lightning.parallel import Processes


class ShardedRows(Rows):
    """The rows of a sharded weight: each process holds some of them, perhaps none.

    All processes must gather at the same time. The failure of another process is raised instead.
    """

    def __init__(self, weight: DTensor, processes: Processes) -> None:
        self._number, self._mesh, self._placements = len(weight), weight.device_mesh, weight.placements
        self._processes = processes
        at_most = -(-self._number // self._mesh.size())  # as `torch.chunk` divides them
        self._own = slice(self._mesh.get_local_rank() * at_most, (self._mesh.get_local_rank() + 1) * at_most)

    def gather(self, own: Tensor) -> Tensor:
        """Return the entries of the rows of all processes."""
        self._processes.all_reduce_min(0)
        shape = torch.Size((self._number, *own.shape[1:]))
        layout: dict[str, Any] = {"shape": shape, "stride": torch.empty(shape, device="meta").stride()}
        return DTensor.from_local(own.contiguous(), self._mesh, self._placements, **layout).full_tensor()

    def own(self, entries: Tensor) -> Tensor:
        """Return the entries of the own rows."""
        return entries[self._own]


def rows_of(layer: Layer, processes: Processes) -> Rows:
    """Return the rows of a layer that this process holds; while FSDP2 gathers the layer, it holds all of them."""
    weight = layer.parameter
    return ShardedRows(weight, processes) if isinstance(weight, DTensor) else ALL_ROWS
