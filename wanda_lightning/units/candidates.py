"""Find hidden units that can perhaps be taken out: what writes, carries and reads them.

A unit has a row in each of the layers that write it, with an entry of their bias, and a column in the layer that reads
it. This file proposes candidates by shapes alone. The caller measures which of them are right, so no table
of model families is needed: a block must compute the same with units that are zero as without them.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Module

from wanda_lightning.common.aliases import Action
from wanda_lightning.core.types import Units
from wanda_lightning.models import own_tensors
from wanda_lightning.models.layers import Layer, adapted_module, is_whole, whole_layer

# Attributes that hold the number of units: of modules that read them, that write them, that do both, and around them.
_INPUTS = frozenset({"in_features", "in_channels", "nx"})
_OUTPUTS = frozenset({"out_features", "out_channels", "nf"})
_VECTORS = frozenset({"num_features", "num_channels", "groups"}) | _INPUTS | _OUTPUTS
_AROUND = frozenset({"intermediate_size", "ffn_dim", "hidden_features", "inner_dim"})


Change = tuple[Module, str, Any]  # an attribute of a module, and its new value
Line = tuple[Module, str, int]  # a tensor of a module, and a dimension


@dataclass(frozen=True)
class Slot:
    """The entries of a tensor that belong to hidden units."""

    module: Module
    name: str  # of the tensor
    dim: int  # along which the units lie
    copies: int = (
        1  # parts along `dim` with all units: a fused layer of a gated MLP writes each unit twice
    )

    @property
    def tensor(self) -> Tensor:
        """The parameter or buffer."""
        return getattr(self.module, self.name)

    @property
    def line(self) -> Line:
        """The tensor and the dimension."""
        return self.module, self.name, self.dim

    def zeros(self) -> Units:
        """Return which units have only zeros here."""
        is_zero = (self.tensor == 0).movedim(self.dim, 0)
        is_zero = is_zero.reshape(len(is_zero), -1).all(dim=1)
        return is_zero.cpu().reshape(self.copies, -1).all(dim=0)

    def taken(self, units: Units) -> Tensor:
        """Return the tensor without the other units."""
        return self.like(self.tensor.detach().index_select(self.dim, self.where(units)))

    def like(self, new: Tensor) -> Tensor:
        """Return a tensor as a parameter if this one is a parameter."""
        if isinstance(self.tensor, nn.Parameter):
            return nn.Parameter(new, self.tensor.requires_grad)
        return new

    def where(self, units: Units) -> Tensor:
        """Return the positions of units."""
        return units.cpu().repeat(self.copies).nonzero().flatten().to(self.tensor.device)


Slots = tuple[Slot, ...]


def replace_attributes(values: Iterable[Change]) -> Action:
    """Set attributes of modules one after the other, and return a function that undoes it."""
    before = []
    for module, name, value in values:
        before.append((module, name, getattr(module, name)))
        setattr(module, name, value)
    torch.clear_autocast_cache()  # it holds casts of the weights
    return partial(replace_attributes, before[::-1])  # type: ignore[return-value]


@dataclass(frozen=True)
class HiddenUnits:
    """Hidden units that one layer reads, and every tensor with an entry, a row or a column for each of them.

    The reader's own columns are the last slot. Tensors between writers and reader, such as depthwise convolutions and
    the statistics of BatchNorm, belong to the units, too; so do columns of the layers of a squeeze-and-excitation.
    """

    reader: Layer
    width: int  # number of units
    slots: Slots
    writers: tuple[
        Layer, ...
    ] = ()  # and other layers that read the units on their way to the reader
    parents: tuple[Module, ...] = ()  # modules whose attributes may hold the width

    @property
    def columns_per_unit(self) -> int:
        """Number of columns of the reader's matrix for each unit: the positions of its kernel."""
        return self.reader.shape[1] // self.width

    @property
    def lines(self) -> set[Line]:
        """The tensors, each with the dimension along which the units lie."""
        return {slot.line for slot in self.slots}

    @property
    def sides(self) -> Slots:
        """The matrices that write or read the units; the last is the reader's.

        A unit with zeros in all of them can be taken out. What lies in between, such as biases and depthwise
        convolutions, may be anything: what the unit computes from it meets zeros only.
        """
        return tuple(
            slot
            for slot in self.slots
            if slot.tensor.ndim > 1 and not _is_depthwise(slot.module, self.width)
        )

    def zero(self, units: Units) -> None:
        """Set all parameters of some units to zero; running statistics stay."""
        for slot in self.slots:
            if isinstance(slot.tensor, nn.Parameter):
                slot.tensor.detach().index_fill_(slot.dim, slot.where(units), 0)
        torch.clear_autocast_cache()  # it holds casts of the weights

    def take(self, units: Units) -> Action:
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

    def _without(self, units: Units) -> Iterator[Change]:
        """Yield new tensors and widths, each after the one before is set: a tensor may have two slots."""
        number = int(units.sum())
        for slot in self.slots:
            tensor = slot.taken(units)
            layer = whole_layer(slot.module)
            if layer is None:
                names = _VECTORS
            elif slot == columns_of(layer):
                names = _INPUTS
            else:
                names = _OUTPUTS
            width_before = slot.tensor.shape[slot.dim]
            yield from _resized(slot.module, names, width_before, tensor.shape[slot.dim])
            yield slot.module, slot.name, tensor
        for parent in self.parents:
            yield from _resized(parent, _AROUND, self.width, number)
            yield from _resized(parent, _AROUND, 2 * self.width, 2 * number)


UnitsByReader = Mapping[str, HiddenUnits]


def _whole_layers(scope: Module, reader: Layer) -> list[Layer]:
    """Return the modules that are whole layers, but not the reader."""
    layers = map(whole_layer, scope.modules())
    return [layer for layer in layers if layer and layer.module is not reader.module]


def _written_units(width: int, layers: Sequence[Layer]) -> Iterator[Slots]:
    """Propose rows of hidden units without heads: all layers of this width together, each alone, halves of a wider one.

    A gated MLP writes its units by two layers, or by one fused layer that is twice as wide.
    """
    writers = [layer for layer in layers if layer.shape[0] == width]
    if writers:
        yield tuple(slot for layer in writers for slot in _rows(layer))
    yield from map(_rows, writers)
    for layer in layers:
        if layer.shape[0] == 2 * width:
            yield _rows(layer, copies=2)


def _rows(layer: Layer, copies: int = 1) -> Slots:
    """Return the rows of a layer, and the entries of its bias."""
    slots = [Slot(layer.module, "weight", 0 if layer.kind.rows_first else 1, copies)]
    if isinstance(getattr(layer.module, "bias", None), Tensor):
        slots.append(Slot(layer.module, "bias", 0, copies))
    return tuple(slots)


def columns_of(layer: Layer) -> Slot:
    """Return the columns of a layer: its input channels."""
    return Slot(layer.module, "weight", 1 if layer.kind.rows_first else 0)


def _resized(module: Module, names: frozenset[str], before: int, after: int) -> list[Change]:
    return [
        (module, name, after)
        for name in names & vars(module).keys()
        if getattr(module, name) == before
    ]


def removable_units(reader: Layer, block: Module) -> Iterator[HiddenUnits]:
    """Yield candidates for the hidden units that a layer reads, the likeliest first.

    Their writers are sought in the module that contains the layer, then in its block; anything may lie between writers
    and reader. Nothing is proposed if the block has adapters, which were trained for this width.
    """
    if adapted_module(block) is not None or not is_whole(reader):
        return
    width = reader.width
    containing = (module for module in block.modules() if reader.module in module.children())
    parent = next(containing, block)
    proposed = set()
    for scope in dict.fromkeys((parent, block)):
        layers = _whole_layers(scope, reader)
        parents = tuple(dict.fromkeys((parent, scope)))
        for slots in _removable_slots(reader, scope, layers):
            if slots in proposed:
                continue
            proposed.add(slots)
            modules = {slot.module for slot in slots}
            others = tuple(layer for layer in layers if layer.module in modules)
            yield HiddenUnits(reader, width, slots, others, parents)


def _removable_slots(reader: Layer, scope: Module, layers: Sequence[Layer]) -> Iterator[Slots]:
    """Yield the tensors that may hold the units: the rows that write them, others in between, the reader's columns."""
    width = reader.width
    position = {module: number for number, module in enumerate(scope.modules())}
    end = position.get(reader.module, len(position))  # a reader outside of the scope comes last
    vectors = list(_carried(scope, width))
    # Smaller ones only: the weights of the largest say which units matter, not those of a squeeze-and-excitation.
    readers = [
        columns_of(layer) for layer in layers if layer.width == width and layer.size <= reader.size
    ]
    likeliest_first = sorted(
        _written_units(width, layers), key=partial(_remoteness, position=position, end=end)
    )
    for rows in likeliest_first:
        first = min(position[slot.module] for slot in rows)
        vectors_between = [slot for slot in vectors if first < position[slot.module] < end]
        readers_between = [slot for slot in readers if first < position[slot.module] < end]
        # First only what lies between writers and reader, then anything in the scope, since modules may be registered
        # in another order; last, nothing else.
        for others in (
            vectors_between,
            vectors_between + readers_between,
            vectors,
            vectors + readers,
            [],
        ):
            yield (*rows, *others, columns_of(reader))


def _remoteness(rows: Slots, position: Mapping[Module, int], end: int) -> tuple[int, bool, int]:
    """Order proposals for the writers of units: the fewest first, then the nearest before the reader at `end`.

    More writers than needed fit, too, if parts of a model are alike, but then all lose the units that one loses.
    """
    last = max(position[slot.module] for slot in rows)
    number_of_writers = len({slot.module for slot in rows})
    return number_of_writers, last > end, abs(end - last)


def _carried(scope: Module, width: int) -> Iterator[Slot]:
    """Yield what has one entry for each unit, such as BatchNorm and depthwise convolutions."""
    for module in scope.modules():
        if _is_depthwise(module, width):
            for name in ("weight", "bias"):
                if getattr(module, name) is not None:
                    yield Slot(module, name, 0)
        elif whole_layer(module) is None:
            for name, tensor in own_tensors(module):
                if tensor.shape == (width,):
                    yield Slot(module, name, 0)


def _is_depthwise(module: Module, width: int) -> bool:
    if not isinstance(module, nn.Conv1d | nn.Conv2d):
        return False
    return module.groups == module.in_channels == module.out_channels == width
