"""Layers that FSDP2 divides over processes: solved by rows, or gathered."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from wanda_lightning.core.selection import ALL_ROWS, Rows
from wanda_lightning.models import Layer
from wanda_lightning.parallel import Processes, first_index


class ShardedRows(Rows):
    """The rows of a sharded weight: each process holds some of them, perhaps none.

    All processes must gather at the same time. The failure of another process is raised instead.
    """

    def __init__(self, weight: DTensor, processes: Processes) -> None:
        self._number, self._mesh, self._placements = len(weight), weight.device_mesh, weight.placements
        self._processes, first = processes, first_index(weight)
        self._own = slice(first, first + len(weight.to_local()))

    def gather(self, own: Tensor) -> Tensor:
        """Return the entries of the rows of all processes."""
        self._processes.all_reduce_min(0)
        shape = torch.Size((self._number, *own.shape[1:]))
        layout: dict[str, Any] = {"shape": shape, "stride": torch.empty(shape, device="meta").stride()}
        return DTensor.from_local(own.contiguous(), self._mesh, self._placements, **layout).full_tensor()

    def own(self, entries: Tensor) -> Tensor:
        """Return the entries of the own rows."""
        return entries[self._own]

    def sum(self, part: Tensor) -> Tensor:
        """Return the sum over all processes."""
        self._processes.all_reduce_min(0)
        total = part.clone()
        self._processes.all_reduce_sum([total])
        return total


def rows_of(layer: Layer, processes: Processes) -> Rows:
    """Return the rows of a layer that this process holds; of a layer that is gathered, all of them."""
    weight = layer.parameter
    return ShardedRows(weight, processes) if isinstance(weight, DTensor) else ALL_ROWS


def _is_by_rows(layer: Layer, weight: DTensor) -> bool:
    """Whether a process holds whole rows of the matrix of a sharded layer, and no other matrix."""
    is_alone = layer.expert is None and layer.group is None
    return is_alone and layer.kind.rows_first and weight.placements == (Shard(0),)


@contextmanager
def gathered(layers: Iterable[Layer], processes: Processes) -> Iterator[None]:
    """Gather the weights and biases of layers that are sharded otherwise than by rows; at the end, write the shards.

    These are experts, groups of convolutions, and layers that store their weights by columns.
    """
    others = [x for x in layers if isinstance(x.parameter, DTensor) and not _is_by_rows(x, x.parameter)]
    names = ((x.module, name) for x in others for name in (x.parameter_name, x.bias_name))
    every: dict[tuple[nn.Module, str], Any] = {key: key[0]._parameters.get(key[1]) for key in names}
    shards: dict[tuple[nn.Module, str], Any] = {key: each for key, each in every.items() if isinstance(each, DTensor)}
    try:
        for (module, name), shard in shards.items():
            module._parameters[name] = nn.Parameter(_full(shard, processes), requires_grad=False)
        yield
    finally:
        for (module, name), shard in shards.items():
            full = module._parameters[name]
            module._parameters[name] = shard
            if isinstance(full, Tensor) and full is not shard:
                copies = DTensor.from_local(full.detach(), shard.device_mesh, [Replicate()])
                shard.to_local().detach().copy_(copies.redistribute(placements=shard.placements).to_local())


class WholeMatrices:
    """Reads whole layers of a model that may be sharded; all processes must read them in the same order."""

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._last: tuple[Tensor, Tensor] | None = None  # the last parameter and all of it: experts share one

    def __call__(self, layer: Layer) -> Tensor:
        """Return the weight of a layer as (d_out, d_in)."""
        weight = layer.parameter
        if not isinstance(weight, DTensor):
            return layer.read()
        if self._last is None or self._last[0] is not weight:
            self._last = None  # frees it
            self._last = weight, _full(weight, self._processes)
        return layer.kind.read(layer.part(self._last[1]))


def _full(shard: DTensor, processes: Processes) -> Tensor:
    processes.all_reduce_min(0)  # raises the failure of another process
    full: Tensor = shard.full_tensor().detach()
    return full
