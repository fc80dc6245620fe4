"""Everything that touches the internals of FSDP2 (`fully_shard`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

from torch import nn
from torch.distributed.fsdp import FSDPModule

from wanda_lightning.parallel.processes import Processes


class ForwardOrderCheck:
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

    def __enter__(self) -> ForwardOrderCheck:
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
        if self._processes.all_reduce_min(here) != _HASHES - self._processes.all_reduce_min(_HASHES - here):
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
            root.reset_iter_state()


@contextmanager
def reset_fsdp_on_exit(model: nn.Module) -> Iterator[None]:
    """Forward passes that are left in the middle leave no trace in FSDP2 modules."""
    try:
        yield
    finally:
        _end_forward(model)
