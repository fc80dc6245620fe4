"""Models whose weights FSDP2 (`fully_shard`) divides over processes: they train with their zeros, and are saved."""

from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import Module

from wanda_lightning.common.aliases import Kwargs
from wanda_lightning.parallel.processes import Processes


def is_sharded(model: Module) -> bool:
    """Whether FSDP or tensor parallelism divides any part of a model, perhaps from a module around it."""
    # Between its forward and backward, FSDP has replaced the shards (DTensor) with whole tensors. Only this private
    # flag of torch then shows it in a submodule, as `FSDPModule` is the class of the module around it.
    if any(getattr(module, "_is_fsdp_managed_module", False) for module in model.modules()):
        return True
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def reshard(model: Module) -> None:
    """Free the gathered weights of every FSDP2 module, because only writes to the shards persist."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def shard_processes(model: Module) -> Processes:
    """Return the processes that FSDP2 shards a model over."""
    shard = next(parameter for parameter in model.parameters() if isinstance(parameter, DTensor))
    return Processes(shard.device_mesh.get_group(), shard.device)


def gathered_state_dict(model: Module) -> Kwargs:
    """Return the whole state dict of a sharded model, on the CPU of the first process; in others it is empty.

    All processes must call it. Tied weights are one tensor, as in the model.
    """
    whole = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    # torch gathers a tied weight once for each of its names.
    first_names: dict[Tensor, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = first_names.setdefault(parameter, name)
        if name in whole and first in whole:
            whole[name] = whole[first]
    return whole
