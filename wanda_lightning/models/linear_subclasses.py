"""Check whether a subclass of `nn.Linear` with a forward of its own still computes `x W^T + b`.

The linear layers of timm, which cast, and of Falcon do. Layers that quantize, scale or route do not. Only a call shows
which, so the forward runs once on a stand-in: an instance made without `__init__`, with a small weight and with copies
of all state that it could write into.
"""

from __future__ import annotations

import copy
from collections import deque
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_OF_LINEAR = frozenset(vars(nn.Linear(1, 1, device="meta")))  # attributes of every instance


@torch.no_grad()
def computes_linear(module: nn.Linear) -> bool:
    """Whether the forward of the module's class computes `x W^T + b`."""
    kind: Any = {"dtype": torch.float32, "device": "cpu"}
    weight = torch.tensor([[0.7, -1.3, 0.1], [-0.4, 0.9, 2.3]], **kind)
    bias = None if module.bias is None else torch.tensor([0.6, -1.1], **kind)
    x = torch.tensor([[[1.7, -0.3, 50.1], [0.2, 0.9, -1.4]], [[-0.6, 2.2, 0.0], [31.3, -7.7, 0.8]]], **kind)
    try:
        with torch.autocast("cpu", enabled=False):
            output, expected = type(module).forward(_stand_in(module, weight, bias), x), F.linear(x, weight, bias)
            return output.shape == expected.shape and torch.allclose(output, expected, rtol=1e-5)
    except Exception:  # it needs more than a weight and a bias
        return False


def _stand_in(module: nn.Linear, weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Copy a module, with another weight and bias."""
    result: nn.Linear = object.__new__(type(module))
    for name, value in vars(module).items():
        shared = name in _OF_LINEAR and name not in ("_buffers", "_modules", "_parameters")  # hooks do not run
        result.__dict__[name] = value if shared else _copy(value, {id(module.weight): weight, id(module.bias): bias})
    result.__dict__ |= {"in_features": 3, "out_features": 2}
    return result


def _copy(value: Any, replacements: dict[int, Any]) -> Any:
    """Copy what a forward could write into: tensors, modules and containers of them."""
    is_mutable = isinstance(value, Tensor | nn.Module | dict | list | set | deque)
    return copy.deepcopy(value, replacements) if is_mutable else value
