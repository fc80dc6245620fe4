"""The private names of PyTorch that calibration needs, where it has no public ones."""

from collections.abc import Sequence
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, overrides
from torch.nn import Module


def is_compiled(module: Module) -> bool:
    """Return whether `Module.compile` was called."""
    return module._compiled_call_impl is not None


def write_count(tensor: Tensor) -> int:
    """Return how often a tensor was written to; always 0 for a tensor of inference mode, which does not count it."""
    return 0 if tensor.is_inference() else tensor._version


def is_transformed(tensor: Tensor) -> bool:
    """Return whether a tensor belongs to a transform of `torch.func`, and so has no memory of its own."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def is_mapped(tensor: Tensor) -> bool:
    """Return whether a tensor has a hidden dimension, over which `torch.func.vmap` maps."""
    return torch._C._functorch.is_batchedtensor(tensor)


def inside_transform() -> bool:
    """Return whether a transform of `torch.func` is active."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def active_modes() -> list[Any]:
    """Return the modes of torch functions, the innermost last."""
    return list(overrides._get_current_function_mode_stack())


def set_active_modes(modes: Sequence[Any]) -> None:
    """Replace the modes of torch functions."""
    current = active_modes()
    if current != modes:
        for _ in current:
            overrides._pop_mode()
        for mode in modes:
            overrides._push_mode(mode)


def visible_attention(*args: Any, **kwargs: Any) -> Any:
    """Call `F.multi_head_attention_forward` so that the active torch-function mode sees each product in it.

    That function passes itself to the mode as a whole, and PyTorch turns the mode off while it runs. The same code does
    not if its `has_torch_function` finds no mode.
    """
    attention = F.multi_head_attention_forward
    names = vars(F) | {"has_torch_function": lambda tensors: False}
    visible = FunctionType(attention.__code__, names, argdefs=attention.__defaults__)
    return visible(*args, **kwargs)
