"""Everything that touches the internals of FSDP2 (`fully_shard`).

FSDP2 gathers a module's weights in its forward hooks and frees them after the call. Calibration interrupts forward
passes in between, so it must know where a call begins, whether all processes make the same calls, and how to reset
FSDP2 after a pass that did not end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from wanda_lightning.common.errors import UserError
from wanda_lightning.parallel.processes import Processes


def entry_point(module: nn.Module) -> str:
    """Return the attribute to replace in order to intercept every call of a module before its inputs are used.

    For an FSDP2 module it is the function that calls the hooks, because the hooks gather the weights, which must not
    happen while other batches wait. For other modules it is the forward, so that their hooks run first, and only once.
    """
    return "_call_impl" if isinstance(module, FSDPModule) else "forward"


@contextmanager
def gathering_noticed(model: nn.Module, notice: Callable[[], None]) -> Iterator[None]:
    """Call `notice` in this block whenever the call of an FSDP2 module has gathered its weights, or freed them."""
    with ExitStack() as hooks:
        for module in _managed(model):  # after the hooks of FSDP2
            hooks.callback(module.register_forward_pre_hook(lambda *_: notice()).remove)
            hooks.callback(module.register_forward_hook(lambda *_: notice()).remove)
        yield


@contextmanager
def fsdp_calls_checked(
    model: nn.Module, processes: Processes, notice: Callable[[], None]
) -> Iterator[Callable[[str, int], None]]:
    """Record the calls of FSDP2 modules in this block, and reset these modules at its end.

    Each call gathers weights. If a model routes its batches, the order of calls may differ between processes; then one
    would get the weights of another module, or wait forever. `notice` is that of `gathering_noticed`.

    Yields:
        A function that compares the calls so far across all processes. It takes the name of the current unit and the
        number of batches that are parked there, and raises a ValueError in every process if they differ.
    """
    calls: list[int] = []  # indices of the modules

    def check(unit: str, parked: int) -> None:
        own = hash((*calls, parked))  # Python's hashes of integers are the same in all processes
        if is_distributed and len({number for (number,) in processes.all_gather([own])}) > 1:
            raise UserError(
                f"strategy must be DDPStrategy for a model that routes its batches: the {processes.world_size} "
                f"processes do not call the same parts of the model in the same order (found at "
                f"{unit or 'the end of the model'}), but FSDP2 communicates in each call. Use DDPStrategy, or prune in "
                "one process (devices=1)."
            )

    managed = _managed(model)
    is_distributed = bool(managed) and processes.world_size > 1
    inner = {module for outer in managed for module in outer.modules() if module is not outer}
    resets = [root.reset_iter_state for root in managed if root not in inner]  # before PyTorch 2.13 there is none
    with ExitStack() as hooks, gathering_noticed(model, notice):
        for index, module in enumerate(managed if is_distributed else ()):
            hooks.callback(module.register_forward_pre_hook(lambda *_, index=index: calls.append(index)).remove)
        try:
            yield check
        finally:  # forward passes may have stopped halfway
            for reset in resets:
                reset()


def _managed(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 manages any part of a model, perhaps from a module around it."""
    return any(getattr(module, "_is_fsdp_managed_module", False) for module in model.modules())


def reshard(model: nn.Module) -> None:
    """Free the gathered weights of every FSDP2 module, because only writes to the shards persist."""
    for module in _managed(model):
        module.reshard()


def shard_processes(model: nn.Module) -> Processes:
    """Return the processes that FSDP2 shards a model over."""
    shard = next(parameter for parameter in model.parameters() if isinstance(parameter, DTensor))
    return Processes(shard.device_mesh.get_group(), shard.device)


def gathered_state_dict(model: nn.Module) -> dict[str, Any]:
    """Return the whole state dict of a sharded model, on the CPU of the first process; in others it is empty.

    All processes must call it. Tied weights are one tensor, as in the model.
    """
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = names.setdefault(id(parameter), name)
        if name in whole and first in whole:
            whole[name] = whole[first]
    return whole
