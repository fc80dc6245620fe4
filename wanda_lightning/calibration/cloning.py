"""Clone the arguments of a call, so that the callee may write into them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from types import FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn

_DEPTH = 6  # arguments, a cache, its list of layers, a layer, its entries for each sample, a tensor


def clone_arguments(value: Any) -> Any:
    """Clone tensors and copy the containers and objects that hold them, such as a key-value cache.

    Two references to one object remain references to one object. Modules, classes, functions, objects that cannot be
    copied and everything below six levels are not copied.
    """
    return _copy(value, Tensor.clone, {}, _DEPTH)


def tensors_within(value: Any) -> list[Tensor]:
    """Return the tensors that `clone_arguments` would clone, each once, in a fixed order."""
    found: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _copy(value, collect, {}, _DEPTH)
    return found


def _copy(
    value: Any, clone_tensor: Callable[[Tensor], Tensor], known: dict[int, Any], depth: int
) -> Any:
    """Copy a value; `known` holds the copies by the id of their original."""
    if id(value) in known:
        return known[id(value)]
    if isinstance(value, Tensor):
        known[id(value)] = clone = clone_tensor(value)
        return clone
    if depth == 0 or isinstance(value, nn.Module | type | ModuleType | FunctionType):
        return value
    each = partial(_copy, clone_tensor=clone_tensor, known=known, depth=depth - 1)
    if isinstance(value, tuple):
        return (
            type(value)(*map(each, value))
            if hasattr(value, "_fields")
            else type(value)(map(each, value))
        )
    try:
        known[id(value)] = clone = copy.copy(value)
        if clone is value:  # immutable, such as a number or a string
            return value
        if isinstance(value, list):
            clone[:] = map(each, value)
        elif isinstance(value, dict):
            clone.update({key: each(inner) for key, inner in value.items()})
        for name in (*getattr(value, "__dict__", ()), *_slots(type(value))):
            if hasattr(value, name):
                object.__setattr__(clone, name, each(getattr(value, name)))
    except Exception:  # for example a lock, a file or a process group
        known[id(value)] = value
    return known[id(value)]


def _slots(kind: type) -> Iterator[str]:
    for base in kind.__mro__:
        slots = vars(base).get("__slots__", ())
        yield from (slots,) if isinstance(slots, str) else slots
