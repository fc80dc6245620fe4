"""Find hidden units that can be taken out of a block: everything that writes, carries and reads them.

This file proposes candidates by shapes alone, as `hidden_units` does. Whether a candidate is right is measured: the
block must compute the same with units that are zero as without them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wanda_lightning.core.types import Units
from wanda_lightning.models.adapters import adapted_module
from wanda_lightning.models.layers import Layer, has_numbers, kind_of

# Attributes that hold the number of units: of modules that read them, that write them, that do both, and around them.
_INPUTS = frozenset({"in_features", "in_channels", "nx"})
_OUTPUTS = frozenset({"out_features", "out_channels", "nf"})
_VECTORS = frozenset({"num_features", "num_channels", "groups"}) | _INPUTS | _OUTPUTS
_AROUND = frozenset({"intermediate_size", "ffn_dim", "hidden_features", "inner_dim"})


@dataclass(frozen=True)
class Slot:
    """The entries of a tensor that belong to hidden units; `copies` consecutive parts have one for each unit."""

    module: nn.Module
    name: str  # of the tensor
    dim: int  # along which the units lie
    copies: int = 1
    interleaved: bool = False  # whether the copies of a unit lie side by side

    @property
    def tensor(self) -> Tensor:
        """The parameter or buffer."""
        found = getattr(self.module, self.name)
        assert isinstance(found, Tensor)
        return found

    @property
    def attributes(self) -> frozenset[str]:
        """The attributes of the module that hold its size along this dimension."""
        layer = whole_layer(self.module)
        if layer is None:
            return _VECTORS
        return _INPUTS if self.name == "weight" and self.dim == _reading(layer) else _OUTPUTS

    def where(self, units: Units) -> Tensor:
        """Return the mask of the entries of some units."""
        return units.repeat_interleave(self.copies) if self.interleaved else units.repeat(self.copies)

    def zero(self, units: Units) -> None:
        """Set the entries of units to zero."""
        tensor = self.tensor.detach()
        tensor.index_fill_(self.dim, self.where(units).nonzero().flatten().to(tensor.device), 0)

    def zeros(self) -> Units:
        """Return which units have only zeros here."""
        tensor = self.tensor.detach().movedim(self.dim, 0).flatten(1) if self.tensor.ndim > 1 else self.tensor[:, None]
        empty = (tensor == 0).all(dim=1).cpu()
        parts = empty.unflatten(0, (-1, self.copies) if self.interleaved else (self.copies, -1))
        return parts.all(dim=1 if self.interleaved else 0)

    def taken(self, units: Units) -> Tensor:
        """Return the tensor without the other units."""
        old = self.tensor
        index = self.where(units).nonzero().flatten().to(old.device)
        new = old.detach().index_select(self.dim, index)
        return nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new


@dataclass(frozen=True)
class RemovableUnits:
    """Hidden units that one layer reads, and every tensor with an entry, a row or a column for each of them.

    The reader's own columns are the last slot. Tensors between writers and reader, such as depthwise convolutions and
    the statistics of BatchNorm, belong to the units, too; so do columns of the layers of a squeeze-and-excitation.
    """

    reader: Layer
    writers: tuple[Layer, ...]  # and other layers that read the units on their way to the reader
    width: int  # number of units
    slots: tuple[Slot, ...]
    parents: tuple[nn.Module, ...] = ()  # modules whose attributes may hold the width

    @property
    def columns(self) -> int:
        """Number of columns of the reader's matrix for each unit: the positions of its kernel."""
        return self.reader.shape[1] // self.width

    def zero(self, units: Units) -> None:
        """Set all parameters of some units to zero; running statistics stay."""
        for slot in self.slots:
            if isinstance(slot.tensor, nn.Parameter):
                slot.zero(units)
        torch.clear_autocast_cache()  # it holds casts of the weights

    def zeros(self) -> Units:
        """Return which units are zero on both sides: in the columns of the readers and the rows of the writers.

        What lies in between, such as biases and depthwise convolutions, may be anything: what a unit computes from it
        meets zeros only.
        """
        return torch.stack([slot.zeros() for slot in self.sides]).all(dim=0)

    @property
    def sides(self) -> tuple[Slot, ...]:
        """The matrices that write or read the units; the last is the reader's."""
        return tuple(s for s in self.slots if s.tensor.ndim > 1 and not _is_depthwise(s.module, self.width))

    def take(self, units: Units) -> None:
        """Take all other units out, in place."""
        number = int(units.sum())
        for slot in self.slots:
            new = slot.taken(units)
            _resize(slot.module, slot.attributes, slot.tensor.shape[slot.dim], new.shape[slot.dim])
            setattr(slot.module, slot.name, new)
        for parent in self.parents:
            _resize(parent, _AROUND, self.width, number)
            _resize(parent, _AROUND, 2 * self.width, 2 * number)
        torch.clear_autocast_cache()

    def undo(self) -> Callable[[], None]:
        """Return a function that puts back the tensors, and the widths of their modules, as they are now."""
        tensors = [(slot.module, slot.name, slot.tensor) for slot in self.slots]
        modules = dict.fromkeys([*(slot.module for slot in self.slots), *self.parents])
        widths = [
            (each, {name: vars(each)[name] for name in (_VECTORS | _AROUND) & vars(each).keys()}) for each in modules
        ]

        def undo() -> None:
            for module, name, tensor in tensors:
                setattr(module, name, tensor)
            for module, found in widths:
                vars(module).update(found)
            torch.clear_autocast_cache()

        return undo

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Undo `zero` and `take` at the end of this block."""
        values = [(slot.tensor.detach(), slot.tensor.detach().clone()) for slot in self.slots]
        undo = self.undo()
        try:
            yield
        finally:
            for tensor, value in values:
                tensor.copy_(value)
            undo()


def _resize(module: nn.Module, attributes: frozenset[str], before: int, after: int) -> None:
    for name in attributes & vars(module).keys():
        if getattr(module, name) == before:
            setattr(module, name, after)


def removable_units(reader: Layer, parent: nn.Module, block: nn.Module) -> Iterator[RemovableUnits]:
    """Yield candidates for the hidden units that a layer reads, the likeliest first.

    Their writers are sought in the module that contains the layer (`parent`), then in its block. Nothing is proposed if
    the block has adapters: they were trained for this width.
    """
    if adapted_module(block) is not None or not _is_whole(reader):
        return
    width = reader.width
    proposed: set[object] = set()
    for scope in dict.fromkeys((parent, block)):
        layers = [layer for module in scope.modules() if (layer := whole_layer(module)) and module is not reader.module]
        index = {module: place for place, module in enumerate(scope.modules())}
        vectors = [*_vectors(scope, width), *_depthwise(scope, width)]
        # The largest layer is the reader: its weights say which units matter, not those of a squeeze-and-excitation.
        smaller = [layer for layer in layers if layer.width == width and layer.size <= reader.size]
        readers = [Slot(layer.module, "weight", _reading(layer)) for layer in smaller]
        last = Slot(reader.module, "weight", _reading(reader))
        for writers, written in _written(layers, width):
            first, end = min(index[layer.module] for layer in writers), index.get(reader.module, len(index))
            between = [slot for slot in vectors if first < index[slot.module] < end]
            inner = [slot for slot in readers if first < index[slot.module] < end]
            for more in (between, [*between, *inner], vectors, [*vectors, *readers], []):
                slots = (*written, *more, last)
                key = tuple((id(slot.module), slot.name, slot.dim, slot.copies, slot.interleaved) for slot in slots)
                if key not in proposed:
                    proposed.add(key)
                    others = [layer for layer in layers if layer.module in {slot.module for slot in slots}]
                    yield RemovableUnits(reader, tuple(others), width, slots, tuple(dict.fromkeys((parent, scope))))


def whole_layer(module: nn.Module) -> Layer | None:
    """Return a module as a layer with one matrix of ordinary numbers; None if it is not one."""
    kind = kind_of(module)
    layer = Layer("", module, kind) if kind else None
    return layer if layer and getattr(module, "groups", 1) == 1 and _is_whole(layer) else None


def _is_whole(layer: Layer) -> bool:
    return layer.expert is None and layer.group is None and has_numbers(layer)


def _written(layers: Sequence[Layer], width: int) -> Iterator[tuple[tuple[Layer, ...], tuple[Slot, ...]]]:
    """Propose writers: one layer or, with a gate, two, or one with twice the rows."""
    same = [layer for layer in layers if layer.shape[0] == width]
    for writers in (same, *([layer] for layer in same if len(same) > 1)):
        if writers:
            yield tuple(writers), tuple(slot for layer in writers for slot in _rows(layer))
    for layer in layers:
        if layer.shape[0] == 2 * width:
            yield (layer,), _rows(layer, 2)
            yield (layer,), _rows(layer, 2, interleaved=True)


def _rows(layer: Layer, copies: int = 1, interleaved: bool = False) -> tuple[Slot, ...]:
    """Return the rows of a layer, and the entries of its bias."""
    slots = [Slot(layer.module, "weight", 1 - _reading(layer), copies, interleaved)]
    if isinstance(getattr(layer.module, "bias", None), Tensor):
        slots.append(Slot(layer.module, "bias", 0, copies, interleaved))
    return tuple(slots)


def _vectors(scope: nn.Module, width: int) -> Iterator[Slot]:
    """Yield the parameters and buffers with one number for each unit, such as those of BatchNorm."""
    for module in scope.modules():
        if whole_layer(module) is None and not _is_depthwise(module, width):
            for tensors in (module.named_parameters, module.named_buffers):
                for name, tensor in tensors(recurse=False):
                    if tuple(tensor.shape) == (width,):
                        yield Slot(module, name, 0)


def _depthwise(scope: nn.Module, width: int) -> Iterator[Slot]:
    """Yield what depthwise convolutions have for each unit."""
    for module in scope.modules():
        if _is_depthwise(module, width):
            yield Slot(module, "weight", 0)
            if module.bias is not None:
                yield Slot(module, "bias", 0)


def _is_depthwise(module: nn.Module, width: int) -> bool:
    if not isinstance(module, nn.Conv1d | nn.Conv2d):
        return False
    return module.groups == module.in_channels == module.out_channels == width


def _reading(layer: Layer) -> int:
    """Return the dimension of the weight along which the inputs lie."""
    return 1 if layer.kind.rows_first else 0
