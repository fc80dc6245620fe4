"""The collectives by which several processes prune one model.

Every process calls the same collectives in the same order, or all wait for each other for ever. So whatever can fail in
one process alone runs inside `Processes.together`, and every `minimum` also hears that a process failed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

Shared = TypeVar("Shared")


class Processes:
    """The processes that prune together; by default this one alone, for which nothing is ever sent.

    Args:
        group: The `torch.distributed` process group.
        device: Where its backend wants tensors; None is the CPU.

    Attributes:
        world_size: How many there are.
        rank: Which one this is, from 0.
    """

    def __init__(self, group: Any = None, device: torch.device | None = None) -> None:
        self._group, self._device = group, device or torch.device("cpu")
        self.world_size: int = 1 if group is None else dist.get_world_size(group)
        self.rank: int = 0 if group is None else dist.get_rank(group)
        self._known_failure: BaseException | None = None

    def all_reduce_min(self, value: int) -> int:
        """The smallest of the values that the processes give; at least 0.

        Raises:
            ValueError: If another process failed with one.
            RuntimeError: If another process failed with something else.
        """
        assert value >= 0, "negative values say that a process failed"
        lowest = self._lowest(value)
        if lowest < 0:
            self._fail_with(-1 - lowest)
        return lowest

    def all_reduce_sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the processes, in place; one message for each dtype."""
        if self.world_size == 1:
            return
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            parts = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([part.to(self._device).flatten() for part in parts])
            dist.all_reduce(flat, group=self._group)
            for part, total in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
                part.copy_(total.view_as(part))

    def broadcast(self, value: Shared, source: int) -> Shared:
        """What the process `source` has for `value`."""
        self.all_reduce_min(0)
        return self._broadcast(value, source)

    def _broadcast(self, value: Shared, source: int) -> Shared:
        if self.world_size == 1:
            return value
        box: list[Any] = [value]
        ranks = dist.get_process_group_ranks(self._group)
        dist.broadcast_object_list(box, src=ranks[source], group=self._group, device=self._device)
        return box[0]

    @contextmanager
    def fail_together(self) -> Iterator[None]:
        """All processes get through this block, or all raise: the failing ones what they raised, the others who it was.

        Inside, another `together`, `minimum` and `share` are welcome, as they on_product of a failure; `add` does not.
        """
        if self.world_size == 1:
            yield
            return
        try:
            yield
        except Exception as error:
            if error is not self._known_failure:
                self._known_failure = error
                what = isinstance(error, ValueError), f"{type(error).__name__}: {error}"
                self._broadcast(what, -1 - self._lowest(-1 - self.rank))
            raise
        self.all_reduce_min(0)

    def _lowest(self, value: int) -> int:
        if self.world_size == 1:
            return value
        tensor = torch.tensor(value, device=self._device)
        dist.all_reduce(tensor, dist.ReduceOp.MIN, group=self._group)
        return int(tensor)

    def _fail_with(self, rank: int) -> None:
        for_the_user, what = self._broadcast((False, ""), rank)
        failure = ValueError if for_the_user else RuntimeError
        self._known_failure = failure(f"process {rank} of {self.world_size} (counted from 0) stopped: {what}")
        raise self._known_failure


SINGLE_PROCESS = Processes()


def local(tensor: Tensor) -> Tensor:
    """What of a tensor is in this process: of a sharded one its shard, else the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def zero_counts(tensors: Sequence[Tensor], processes: Processes = SINGLE_PROCESS) -> list[int]:
    """How many zeros each tensor has, over all processes; what every process has a copy of counts once."""
    counts = torch.zeros(len(tensors), dtype=torch.int64)
    for index, tensor in enumerate(tensors):
        if processes.rank == 0 or isinstance(tensor, DTensor):
            counts[index] = (local(tensor.detach()) == 0).count_nonzero()
    processes.all_reduce_sum([counts])
    return counts.tolist()
