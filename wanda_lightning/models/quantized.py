"""Recognize quantized layers, which cannot be pruned, and read their weights as ordinary numbers."""

from itertools import starmap
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import Module

# Packages whose classes hold quantized weights.
_QUANTIZERS = {
    "aqlm",
    "auto_gptq",
    "awq",
    "bitsandbytes",
    "compressed_tensors",
    "eetq",
    "gptqmodel",
    "hqq",
    "optimum",
    "quanto",
    "torchao",
    "vptq",
}
# Packages whose weights `read_weight` can dequantize.
_READABLE = ("torchao", "bitsandbytes")


def is_wrapper(parameter: Tensor) -> bool:
    """Whether a parameter is a tensor subclass without numbers of its own, such as one that wraps quantized codes."""
    # Not `isinstance`: a tensor subclass may answer with the class of the tensor that it wraps.
    return not issubclass(type(parameter), nn.Parameter | DTensor)


def is_packed(parameter: Tensor) -> bool:
    """Whether a parameter holds anything but dense floating-point numbers of at least 16 bits."""
    return is_wrapper(parameter) or _holds_codes(parameter)


def is_packed_weight(name: str, buffer: Tensor) -> bool:
    """Whether a buffer, by its name and dtype, holds the packed weights of a quantized layer."""
    return buffer.ndim >= 2 and _holds_codes(buffer) and "weight" in name.rpartition(".")[2]


def quantizer(module: Module, parameter: Tensor | None = None) -> str | None:
    """Return the quantization library that defines the class of a module or of its parameter, if one does."""
    for defined in (type(parameter), type(module)):
        package = defined.__module__.partition(".")[0]
        if package in _QUANTIZERS:
            return package
    return None


def is_quantized(module: Module) -> bool:
    """Whether a module's own parameters or buffers hold quantized weights, or a quantization library defines it."""
    if quantizer(module):
        return True

    for parameter in module.parameters(recurse=False):
        if is_packed(parameter) or quantizer(module, parameter):
            return True
    return any(starmap(is_packed_weight, module.named_buffers(recurse=False)))


def can_be_read(module: Module) -> bool:
    """Whether `read_weight` can return the weight of a module."""
    library = quantizer(module, getattr(module, "weight", None))
    return library in _READABLE or not is_quantized(module)


@torch.no_grad()
def read_weight(module: Any) -> Tensor:
    """Return the weight of a module that can be read, in floating point; a quantized one is dequantized to a copy."""
    weight = module.weight
    match quantizer(module, weight):
        case "torchao":
            return weight.dequantize()
        case "bitsandbytes":
            from transformers.integrations.bitsandbytes import dequantize_bnb_weight

            module.state_dict()  # restores the order of 4-bit codes, which some CPUs change in evaluation mode
            scales = getattr(module, "state", None)  # 8-bit layers keep them beside the weight
            return dequantize_bnb_weight(weight, scales)
    return weight.detach()


def _holds_codes(tensor: Tensor) -> bool:
    return (
        not tensor.is_floating_point()
        or tensor.element_size() < 2
        or tensor.layout is not torch.strided
    )
