"""Everything that touches the internals of FSDP2 (`fully_shard`).

FSDP2 gathers a module's weights in its forward hooks and frees them after the call. Calibration interrupts forward
passes between these points. Therefore it must know where a call begins, check that all processes make the same calls,
and reset FSDP2 after a pass that did not end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.distributed.fsdp import FSDPModule

from wanda_lightning.parallel.processes import Processes


def entry_point(module: nn.Module) -> str:
    """Return the attribute to replace in order to intercept every call of a module before its inputs are used.

    For an FSDP2 module it is the function that calls the hooks, because the hooks gather the weights, which must not
    happen while other batches wait. For other modules it is the forward, so that their hooks run first, and only once.
    """
    return "_call_impl" if isinstance(module, FSDPModule) else "forward"


class ForwardOrderCheck:
    """Checks that all processes call the same FSDP2 modules in the same order, because each call gathers weights.

    The order may differ if a model routes its batches. Then a process would get the weights of another module, or wait
    forever.
    """

    def __init__(self, model: nn.Module, processes: Processes) -> None:
        self._processes = processes
        self._calls = 0  # a hash of all calls so far
        modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self._handles = [
            module.register_forward_pre_hook(self._recorder(index))
            for index, module in enumerate(modules)
            if processes.world_size > 1 and isinstance(module, nn.Module)
        ]

    def __enter__(self) -> ForwardOrderCheck:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def check(self, unit: str, calls: int) -> None:
        """Compare the calls so far and the number of parked calls across all processes.

        Args:
            unit: Name of the unit, for the message.
            calls: Number of batches that are parked there.

        Raises:
            ValueError: In every process, if they differ.
        """
        if not self._handles:
            return
        here = hash((self._calls, calls)) % _HASHES
        if self._processes.all_reduce_min(here) != _HASHES - self._processes.all_reduce_min(_HASHES - here):
            raise ValueError(
                f"strategy must be DDPStrategy for a model that routes its batches: the {self._processes.world_size} "
                "processes do not call the same parts of the model in the same order (found at "
                f"{unit or 'the end of the model'}), but FSDP2 communicates in each call. Use DDPStrategy, or prune in "
                "one process (devices=1)."
            )

    def _recorder(self, index: int) -> Callable[..., None]:
        def record(*_: object) -> None:
            self._calls = hash((self._calls, index))

        return record


_HASHES = 1 << 62  # Python's hashes of integers are the same in all processes


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 manages any part of a model."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def reshard(model: nn.Module) -> None:
    """Free the gathered weights of every FSDP2 module, because only writes to the shards persist."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def reset_fsdp_on_exit(model: nn.Module) -> Iterator[None]:
    """Reset all FSDP2 modules at the end of this block, because forward passes may have stopped halfway."""
    try:
        yield
    finally:
        managed = [module for module in model.modules() if isinstance(module, FSDPModule)]
        inner = {module for outer in managed for module in outer.modules() if module is not outer}
        for root in managed:
            if root not in inner:
                root.reset_iter_state()
