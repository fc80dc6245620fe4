"""Walk trees of tensors: batches, and the arguments and outputs of calls.

Batches consist of mappings, lists and tuples, which `map_tensors` rebuilds. Arguments may also be objects with tensors,
such as a key-value cache, which `clone_arguments` copies. Autograd sees only the tensors of a tree: `take_out_tensors`.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from types import FunctionType, ModuleType
from typing import Any

from torch import Tensor
from torch.nn import Module

# Private, but the registry in which transformers enters its output classes; torch 2.13 has no public name for it.
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only


def map_tensors(function: Callable[..., object], tree: Any, *others: Any) -> Any:
    """Apply a function to every tensor in a nesting of mappings, lists and tuples, and return its results as one.

    If there are `others`, which have the same keys and lengths, the function receives the tensors at the same place of
    all trees. Mappings become dictionaries.
    """
    if isinstance(tree, Tensor):
        return function(tree, *others)
    if isinstance(tree, Mapping):
        mapped = {}
        for key, value in tree.items():
            at_key = [other[key] for other in others]
            mapped[key] = map_tensors(function, value, *at_key)
        return mapped
    if isinstance(tree, tuple | list):
        columns = zip(tree, *others, strict=True)
        return _like(tree, [map_tensors(function, *column) for column in columns])
    return tree


def all_tensors(batch: Any) -> list[Tensor]:
    """Return all tensors of a batch."""
    tensors: list[Tensor] = []
    map_tensors(tensors.append, batch)
    return tensors


def tensors_of(batch: Any) -> list[Tensor]:
    """Return all tensors of a batch that have at least one dimension."""
    return [tensor for tensor in all_tensors(batch) if tensor.ndim]


def _like(sequence: Any, values: Iterable[Any]) -> Any:
    """Return a list, tuple or named tuple of the same class with other values."""
    if hasattr(sequence, "_fields"):
        return type(sequence)(*values)
    return type(sequence)(values)


# ---- trees with objects


def clone_arguments(value: Any) -> Any:
    """Clone tensors and copy the containers and objects that hold them, such as a key-value cache.

    Two references to one object remain references to one object. Modules, classes, functions, objects that cannot be
    copied and everything below six levels are not copied.
    """
    return _Copier(Tensor.clone).copy(value)


def tensors_within(value: Any) -> list[Tensor]:
    """Return the tensors that `clone_arguments` would clone, each once, in a fixed order."""
    tensors: list[Tensor] = []
    _Copier(tensors.append).copy(value)
    return tensors


_DEPTH = 6  # arguments, a cache, its list of layers, a layer, its entries for each sample, a tensor


class _Copier:
    """Copies trees that may contain objects and cycles."""

    def __init__(self, clone_tensor: Callable[[Tensor], object]) -> None:
        self._clone_tensor = clone_tensor
        self._copies: dict[int, Any] = {}  # by the identity of the original

    def copy(self, value: Any, depth: int = _DEPTH) -> Any:
        """Return the copy of a value, which is made once."""
        if id(value) in self._copies:
            return self._copies[id(value)]
        if isinstance(value, Tensor):
            clone = self._clone_tensor(value)
            self._copies[id(value)] = clone
            return clone
        if depth == 0 or isinstance(value, Module | type | ModuleType | FunctionType):
            return value
        if isinstance(value, tuple):
            return _like(value, [self.copy(item, depth - 1) for item in value])

        try:
            clone = copy.copy(value)
            # Before its contents, which may refer to it.
            self._copies[id(value)] = clone
            if clone is not value:  # else it is immutable, such as a number or a string
                self._copy_contents(value, clone, depth - 1)
        except Exception:  # for example a lock, a file or a process group
            self._copies[id(value)] = value
        return self._copies[id(value)]

    def _copy_contents(self, value: Any, clone: Any, depth: int) -> None:
        """Replace the items and attributes of a shallow copy by their own copies."""
        if isinstance(value, list):
            clone[:] = [self.copy(item, depth) for item in value]
        elif isinstance(value, dict):
            clone.update({key: self.copy(item, depth) for key, item in value.items()})
        for name, attribute in getattr(value, "__dict__", {}).items():
            object.__setattr__(clone, name, self.copy(attribute, depth))


# ---- tensors apart from their tree


class _TensorSlot:
    """Stands in a tree where a tensor was taken out."""


def take_out_tensors(tree: Any) -> tuple[list[Tensor], Any]:
    """Return the tensors of a tree in a fixed order, and the tree without them, which `filled` takes.

    It enters the containers that PyTorch knows: lists, tuples, dictionaries and the outputs of transformers. Any other
    object remains in the tree, with the tensors inside of it.
    """
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return tensors, tree_map_only(Tensor, lambda tensor: _TensorSlot, tree)


def filled(tree: Any, tensors: Iterable[Tensor]) -> Any:
    """Return a tree with tensors in the places of those that were taken out."""
    remaining = iter(tensors)
    return tree_map(lambda leaf: next(remaining) if leaf is _TensorSlot else leaf, tree)
