"""Find tensors that share their memory, such as the embedding and the head of a language model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import chain

from torch import Tensor, nn

from wanda_lightning.core.placeholders import is_unloaded
from wanda_lightning.models.quantized import is_wrapper
from wanda_lightning.parallel import local


def own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Return the names and values of a module's own parameters and buffers."""
    return chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))


def tied_tensors(model: nn.Module) -> set[tuple[nn.Module, str]]:
    """Return the module and the name of each parameter whose memory another parameter or buffer shares."""
    found = [
        (module, name, _memory(tensor))
        for module in model.modules()
        for name, tensor in own_tensors(module)
    ]
    counts = Counter(memory for _, _, memory in found)
    return {(module, name) for module, name, memory in found if counts[memory] > 1}


def _memory(tensor: Tensor) -> int:
    """Return what identifies the memory of a tensor; the tensor itself if it has none, as on the meta device."""
    shard = local(tensor)
    has_memory = (
        not is_unloaded(shard)
        and shard.device.type != "meta"
        and shard.numel()
        and not is_wrapper(tensor)
    )
    return shard.untyped_storage().data_ptr() if has_memory else id(tensor)
