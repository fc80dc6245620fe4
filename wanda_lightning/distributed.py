"""Many processes that prune one model: the few collectives, and what FSDP2 needs around them.

Every process calls the same collectives in the same order, or all wait for each other for ever. So whatever can fail in
one process alone runs inside `Processes.together`, and every `minimum` also hears that a process failed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
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
        self._told: BaseException | None = None

    def minimum(self, value: int) -> int:
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

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the processes, in place; one message for each dtype."""
        if self.world_size == 1:
            return
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            parts = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([part.to(self._device).flatten() for part in parts])
            dist.all_reduce(flat, group=self._group)
            for part, total in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
                part.copy_(total.view_as(part))

    def share(self, value: Shared, source: int) -> Shared:
        """What the process `source` has for `value`."""
        self.minimum(0)
        return self._broadcast(value, source)

    def _broadcast(self, value: Shared, source: int) -> Shared:
        if self.world_size == 1:
            return value
        box: list[Any] = [value]
        ranks = dist.get_process_group_ranks(self._group)
        dist.broadcast_object_list(box, src=ranks[source], group=self._group, device=self._device)
        return box[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """All processes get through this block, or all raise: the failing ones what they raised, the others who it was.

        Inside, another `together`, `minimum` and `share` are welcome, as they hear of a failure; `add` does not.
        """
        if self.world_size == 1:
            yield
            return
        try:
            yield
        except Exception as error:
            if error is not self._told:
                self._told = error
                what = isinstance(error, ValueError), f"{type(error).__name__}: {error}"
                self._broadcast(what, -1 - self._lowest(-1 - self.rank))
            raise
        self.minimum(0)

    def _lowest(self, value: int) -> int:
        if self.world_size == 1:
            return value
        tensor = torch.tensor(value, device=self._device)
        dist.all_reduce(tensor, dist.ReduceOp.MIN, group=self._group)
        return int(tensor)

    def _fail_with(self, rank: int) -> None:
        for_the_user, what = self._broadcast((False, ""), rank)
        failure = ValueError if for_the_user else RuntimeError
        self._told = failure(f"process {rank} of {self.world_size} (counted from 0) stopped: {what}")
        raise self._told


ALONE = Processes()


def local(tensor: Tensor) -> Tensor:
    """What of a tensor is in this process: of a sharded one its shard, else the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def zero_counts(tensors: Sequence[Tensor], processes: Processes = ALONE) -> list[int]:
    """How many zeros each tensor has, over all processes; what every process has a copy of counts once."""
    counts = torch.zeros(len(tensors), dtype=torch.int64)
    for index, tensor in enumerate(tensors):
        if processes.rank == 0 or isinstance(tensor, DTensor):
            counts[index] = (local(tensor.detach()) == 0).count_nonzero()
    processes.add([counts])
    return counts.tolist()


class SamePath:
    """Sees to it that all processes call the same FSDP2 modules in the same order: each call gathers weights.

    Where a model routes its batches they would not, and a process would get another module's weights, or wait for ever.
    """

    def __init__(self, model: nn.Module, processes: Processes) -> None:
        self._processes = processes
        self._path = 0
        modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self._handles = [
            cast(nn.Module, module).register_forward_pre_hook(self._step(index))
            for index, module in enumerate(modules)
            if processes.world_size > 1
        ]

    def __enter__(self) -> SamePath:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def check(self, unit: str, calls: int) -> None:
        """Refuse to go on where the paths differ, or the number of calls that wait at a unit.

        Raises:
            ValueError: In all processes.
        """
        if not self._handles:
            return
        here = hash((self._path, calls)) % _HASHES
        if self._processes.minimum(here) != _HASHES - self._processes.minimum(_HASHES - here):
            raise ValueError(
                f"the batches of the {self._processes.world_size} processes do not call the same parts of the model in "
                f"the same order (seen at {unit or 'the end of the model'}), but FSDP2 communicates in each call. "
                "Prune a model that routes its batches with DDPStrategy, or in one process (devices=1)."
            )

    def _step(self, index: int) -> Callable[..., None]:
        def step(*_: object) -> None:
            self._path = hash((self._path, index))

        return step


_HASHES = 1 << 62  # of integers alone, for which Python's hashes are the same in all processes


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 (`fully_shard`) manages parts of a model."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def reshard(model: nn.Module) -> None:
    """Let every FSDP2 module hold its shards: only what is written there stays."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _end_forward(model: nn.Module) -> None:
    """Bring all FSDP2 modules back to rest after a forward pass that did not come to its end."""
    inner = {
        module
        for outer in model.modules()
        if isinstance(outer, FSDPModule)
        for module in outer.modules()
        if module is not outer
    }
    for root in model.modules():
        if isinstance(root, FSDPModule) and root not in inner:
            if hasattr(root, "reset_iter_state"):
                root.reset_iter_state()
            else:
                _reset_as_torch_does(root)


@contextmanager
def at_rest_afterwards(model: nn.Module) -> Iterator[None]:
    """Forward passes that are left in the middle leave no trace in FSDP2 modules."""
    try:
        yield
    finally:
        _end_forward(model)


def _reset_as_torch_does(root: nn.Module) -> None:
    """What `reset_iter_state` does that matters after a forward pass; PyTorch 2.9 has no such method."""
    for module in root.modules():
        if isinstance(module, FSDPModule):
            state: Any = module._get_fsdp_state()
            state._training_state = type(state._training_state).IDLE
            state._state_ctx.iter_forward_root = None
            state._comm_ctx.post_forward_order.clear()
            if (group := state._fsdp_param_group) is not None:
                group._training_state = type(group._training_state).IDLE
                group._post_forward_indices.clear()
            module.reshard()
