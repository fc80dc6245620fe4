"""The collectives of several processes that prune one model.

All processes must call the same collectives in the same order; otherwise they wait for each other forever. Therefore
code that may fail in a single process runs inside `Processes.fail_together`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from wanda_lightning.common.errors import UserError
from wanda_lightning.common.float64 import has_float64

Value = TypeVar("Value")


class Processes:
    """The processes that prune one model; by default a single process, without communication.

    Args:
        group: The `torch.distributed` process group.
        device: The device that the backend of the group needs; None for the CPU.
    """

    def __init__(self, group: Any = None, device: torch.device | None = None) -> None:
        self._group = group
        self._device = device or torch.device("cpu")
        self.world_size = 1
        self.rank = 0
        if group:
            self.world_size = dist.get_world_size(group)
            self.rank = dist.get_rank(group)
        # The error that all processes know already, so that an outer block does not announce it again.
        self._known_failure: BaseException | None = None

    def all_reduce_min(self, value: int) -> int:
        """Return the smallest value over all processes; no value may be negative.

        Raises:
            ValueError: If another process failed with a ValueError.
            RuntimeError: If another process failed with any other error.
        """
        assert value >= 0, "negative values announce a failure"
        lowest = self._lowest(value)
        if lowest >= 0:
            return lowest

        # `fail_together` sends -1 - rank from the process that failed, and then its error.
        rank = -1 - lowest
        is_refusal, cause = self._broadcast((False, ""), rank)
        failure = UserError if is_refusal else RuntimeError
        self._known_failure = failure(
            f"process {rank} of {self.world_size} (counted from 0) stopped: {cause}"
        )
        raise self._known_failure

    def all_agree(self, answer: bool) -> bool:
        """Return whether all processes answer yes; raises as `all_reduce_min` does."""
        return bool(self.all_reduce_min(int(answer)))

    def all_reduce_sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor in place with its sum over the processes; float64 as float32 if the device lacks it."""
        if self.world_size == 1:
            return
        for tensor in tensors:
            message = tensor
            if tensor.dtype == torch.float64 and not has_float64(self._device):
                message = tensor.float()
            message = message.to(self._device).contiguous()
            dist.all_reduce(message, group=self._group)
            tensor.copy_(message)

    def all_gather(self, values: Sequence[int]) -> list[list[int]]:
        """Return the values of every process by rank; every process must pass the same number of values."""
        table = torch.zeros(self.world_size, len(values), dtype=torch.int64)
        table[self.rank] = torch.tensor(values)
        self.all_reduce_sum([table])
        return table.tolist()

    def broadcast(self, value: Value, source: int) -> Value:
        """Return the value of the process with rank `source`."""
        self.all_reduce_min(0)
        return self._broadcast(value, source)

    def _broadcast(self, value: Value, source: int) -> Value:
        if self.world_size == 1:
            return value
        objects = [value]  # torch replaces the entries in place
        dist.broadcast_object_list(
            objects, group=self._group, device=self._device, group_src=source
        )
        return objects[0]

    @contextmanager
    def fail_together(self) -> Iterator[None]:
        """Make all processes complete this block, or all raise: an error in one of them ends it in all.

        The failed process raises its own error; the others raise an error that names the failed process. Inside the
        block, call `all_reduce_min`, `broadcast` and `fail_together`, which report the failure of another process, but
        not `all_reduce_sum` and `all_gather`.
        """
        if self.world_size == 1:
            yield
            return
        try:
            yield
        except Exception as error:
            if error is not self._known_failure:
                self._known_failure = error
                is_refusal = isinstance(error, UserError | OSError)
                # If several processes failed, they all announce the error of the last one.
                rank = -1 - self._lowest(-1 - self.rank)
                self._broadcast((is_refusal, f"{type(error).__name__}: {error}"), rank)
            raise
        self.all_reduce_min(0)

    def _lowest(self, value: int) -> int:
        if self.world_size == 1:
            return value
        tensor = torch.tensor(value, device=self._device)
        dist.all_reduce(tensor, dist.ReduceOp.MIN, group=self._group)
        return int(tensor)


SINGLE_PROCESS = Processes()


def local(tensor: Tensor) -> Tensor:
    """Return this process's shard of a sharded tensor, and any other tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def first_index(tensor: Tensor) -> int:
    """Return the index at which this process's shard of a tensor starts, if it is sharded on its first dimension."""
    if not isinstance(tensor, DTensor):
        return 0
    # FSDP2 divides the rows as torch.chunk does: each shard has ceil(rows / processes), as long as there are any.
    return tensor.device_mesh.get_local_rank() * -(-len(tensor) // tensor.device_mesh.size())
