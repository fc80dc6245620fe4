"""Find tensors that share their memory, such as the embedding and the head of a language model."""

from collections import Counter
from collections.abc import Iterator
from itertools import chain

from torch import Tensor
from torch.nn import Module

from wanda_lightning.core.placeholders import is_unloaded
from wanda_lightning.models.quantized import is_wrapper
from wanda_lightning.parallel import local


def own_tensors(module: Module) -> Iterator[tuple[str, Tensor]]:
    """Return the names and values of a module's own parameters and buffers."""
    return chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))


def repeated_parameters(model: Module) -> Iterator[tuple[str, str]]:
    """Yield each further name of a parameter that has several names, with its first name."""
    first_names: dict[int, str] = {}  # by the id of the parameter
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = first_names.setdefault(id(parameter), name)
        if first != name:
            yield name, first


def tied_tensors(model: Module) -> set[tuple[Module, str]]:
    """Return the module and the name of each parameter whose memory another parameter or buffer shares."""
    memory = {
        (module, name): _memory_id(tensor)
        for module in model.modules()
        for name, tensor in own_tensors(module)
    }
    uses = Counter(memory.values())
    return {place for place, identifier in memory.items() if uses[identifier] > 1}


def _memory_id(tensor: Tensor) -> int:
    """Return a number that tensors with the same memory share."""
    shard = local(tensor)

    # Such tensors have no memory of their own, or report an address that others report, too.
    if is_unloaded(shard) or shard.device.type == "meta" or not shard.numel() or is_wrapper(tensor):
        return id(tensor)
    return shard.untyped_storage().data_ptr()
