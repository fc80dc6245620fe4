"""Let a torch-function mode see the calls inside a function of `torch.nn.functional`.

Such a function passes itself to the mode as a whole, and PyTorch disables the mode while the function runs. Attention
multiplies by four weights inside `multi_head_attention_forward`, so the mode has to see the calls there. PyTorch has no
switch for this. A copy of the function, in whose namespace `has_torch_function` is always false, computes the same, and
the mode sees the calls inside it.
"""

from __future__ import annotations

from types import FunctionType


def entered_function(function: FunctionType) -> FunctionType:
    """Return a copy of a function that does not pass itself to a torch-function mode."""
    names = {**function.__globals__, "has_torch_function": lambda tensors: False}
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
