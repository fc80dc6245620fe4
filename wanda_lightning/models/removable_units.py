"""Find hidden units that can be taken out of a block: everything that writes, carries and reads them.

This file proposes candidates by shapes alone, as `hidden_units` does. Whether a candidate is right is measured: the
block must compute the same with units that are zero as without them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from wanda_lightning.core.types import Units
from wanda_lightning.models.hidden_units import Slot, columns_of, replace_attributes, whole_layers, written_units
from wanda_lightning.models.layers import Layer, is_whole, whole_layer
from wanda_lightning.models.module_names import adapted_module

# Attributes that hold the number of units: of modules that read them, that write them, that do both, and around them.
_INPUTS = frozenset({"in_features", "in_channels", "nx"})
_OUTPUTS = frozenset({"out_features", "out_channels", "nf"})
_VECTORS = frozenset({"num_features", "num_channels", "groups"}) | _INPUTS | _OUTPUTS
_AROUND = frozenset({"intermediate_size", "ffn_dim", "hidden_features", "inner_dim"})


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

    @property
    def lines(self) -> set[tuple[nn.Module, str, int]]:
        """The tensors, each with the dimension along which the units lie."""
        return {slot.line for slot in self.slots}

    @property
    def sides(self) -> tuple[Slot, ...]:
        """The matrices that write or read the units; the last is the reader's."""
        return tuple(s for s in self.slots if s.tensor.ndim > 1 and not _is_depthwise(s.module, self.width))

    @property
    def inner(self) -> frozenset[nn.Module]:
        """The modules with a matrix that the units enter on their way to the reader."""
        matrices = ((slot, whole_layer(slot.module)) for slot in self.slots[:-1] if slot.tensor.ndim > 1)
        return frozenset(slot.module for slot, own in matrices if own is None or slot.line == columns_of(own).line)

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

    def take(self, units: Units) -> Callable[[], None]:
        """Take all other units out, in place, and return a function that puts the tensors and widths back."""
        return replace_attributes(self._without(units))

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Undo `zero` and `take` at the end of this block, in which the modules have copies of the tensors."""
        undo = self.take(torch.ones(self.width, dtype=torch.bool))
        try:
            yield
        finally:
            undo()

    def _without(self, units: Units) -> Iterator[tuple[nn.Module, str, Any]]:
        """Yield new tensors and widths, each after the one before is set: a tensor may have two slots."""
        number = int(units.sum())
        for slot in self.slots:
            new, names = slot.taken(units), _VECTORS
            if layer := whole_layer(slot.module):
                names = _INPUTS if slot.line == columns_of(layer).line else _OUTPUTS
            yield from _resized(slot.module, names, slot.tensor.shape[slot.dim], new.shape[slot.dim])
            yield slot.module, slot.name, new
        for parent in self.parents:
            yield from _resized(parent, _AROUND, self.width, number)
            yield from _resized(parent, _AROUND, 2 * self.width, 2 * number)


def _resized(module: nn.Module, names: frozenset[str], before: int, after: int) -> list[tuple[nn.Module, str, int]]:
    return [(module, name, after) for name in names & vars(module).keys() if getattr(module, name) == before]


def removable_units(reader: Layer, parent: nn.Module, block: nn.Module) -> Iterator[RemovableUnits]:
    """Yield candidates for the hidden units that a layer reads, the likeliest first.

    Their writers are sought in the module that contains the layer (`parent`), then in its block. Nothing is proposed if
    the block has adapters: they were trained for this width.
    """
    if adapted_module(block) is not None or not is_whole(reader):
        return
    width = reader.width
    proposed: set[object] = set()
    for scope in dict.fromkeys((parent, block)):
        layers = whole_layers(scope, reader)
        index = {module: place for place, module in enumerate(scope.modules())}
        vectors = [*_carried(scope, width)]
        # The largest layer is the reader: its weights say which units matter, not those of a squeeze-and-excitation.
        readers = [columns_of(layer) for layer in layers if layer.width == width and layer.size <= reader.size]
        end = index.get(reader.module, len(index))
        for written in sorted(written_units(width, layers), key=partial(_remoteness, index=index, end=end)):
            first = min(index[slot.module] for slot in written)
            between = [slot for slot in vectors if first < index[slot.module] < end]
            inner = [slot for slot in readers if first < index[slot.module] < end]
            for more in (between, [*between, *inner], vectors, [*vectors, *readers], []):
                slots = (*written, *more, columns_of(reader))
                key = tuple(slot.key for slot in slots)
                if key not in proposed:
                    proposed.add(key)
                    others = [layer for layer in layers if layer.module in {slot.module for slot in slots}]
                    yield RemovableUnits(reader, tuple(others), width, slots, tuple(dict.fromkeys((parent, scope))))


def _remoteness(written: Sequence[Slot], index: Mapping[nn.Module, int], end: int) -> tuple[int, bool, int]:
    """Order proposals for the writers of units: the fewest first, then the nearest before the reader at `end`.

    More writers than needed fit, too, if parts of a model are alike, but then all lose the units that one loses.
    """
    last = max(index[slot.module] for slot in written)
    return len({slot.module for slot in written}), last > end, abs(end - last)


def _carried(scope: nn.Module, width: int) -> Iterator[Slot]:
    """Yield what has one entry for each unit, such as BatchNorm and depthwise convolutions."""
    for module in scope.modules():
        if _is_depthwise(module, width):
            yield from (Slot(module, name, 0) for name in ("weight", "bias") if getattr(module, name) is not None)
        elif whole_layer(module) is None:
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                if tuple(tensor.shape) == (width,):
                    yield Slot(module, name, 0)


def _is_depthwise(module: nn.Module, width: int) -> bool:
    if not isinstance(module, nn.Conv1d | nn.Conv2d):
        return False
    return module.groups == module.in_channels == module.out_channels == width
