"""Find hidden units that can perhaps be permuted or taken out: what writes, carries and reads them.

A permutation of hidden units permutes rows of the layers that write them, with their biases, and columns of the layer
that reads them. This file proposes candidates by shapes alone. The caller measures which of them are right, so no table
of model families is needed: a block must compute the same with units that are zero as without them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from wanda_lightning.core.types import Orders, Units
from wanda_lightning.models import own_tensors
from wanda_lightning.models.layers import Layer, adapted_module, is_plain, is_whole, whole_layer

_HEAD_SIZES = (
    "head_dim",
    "attention_head_size",
    "head_size",
    "v_head_dim",
    "d_head",
    "key_value_proj_dim",
)
_KV_HEADS = ("num_key_value_heads", "num_kv_heads")
# Attributes that hold the number of units: of modules that read them, that write them, that do both, and around them.
_INPUTS = frozenset({"in_features", "in_channels", "nx"})
_OUTPUTS = frozenset({"out_features", "out_channels", "nf"})
_VECTORS = frozenset({"num_features", "num_channels", "groups"}) | _INPUTS | _OUTPUTS
_AROUND = frozenset({"intermediate_size", "ffn_dim", "hidden_features", "inner_dim"})


@dataclass(frozen=True, eq=False)
class Slot:
    """The entries of a tensor that belong to hidden units."""

    module: nn.Module
    name: str  # of the tensor
    dim: int  # along which the units lie
    places: Tensor | None = None  # of the units, as `index`; None if every entry is a unit

    @property
    def tensor(self) -> Tensor:
        """The parameter or buffer."""
        found = getattr(self.module, self.name)
        assert isinstance(found, Tensor)
        return found

    @property
    def index(self) -> Tensor:
        """The positions of the units, (heads, copies, units): heads that share their values read copies of them."""
        return (
            torch.arange(self.tensor.shape[self.dim])[None, None]
            if self.places is None
            else self.places
        )

    @property
    def line(self) -> tuple[nn.Module, str, int]:
        """The tensor and the dimension."""
        return self.module, self.name, self.dim

    @property
    def key(self) -> tuple[object, ...]:
        """The properties that equal slots share."""
        places = None if self.places is None else (self.places.shape, self.places.numpy().tobytes())
        return *self.line, places

    def source(self, orders: Orders) -> Tensor:
        """Return the old position of each entry after the units of each head are put into a new order."""
        source = torch.arange(self.tensor.shape[self.dim])
        index = self.index
        source[index.flatten()] = index.gather(
            2, orders.cpu().unsqueeze(1).expand(index.shape)
        ).flatten()
        return source

    def zeros(self) -> Units:
        """Return which units have only zeros here."""
        empty = (
            self.tensor.detach().movedim(self.dim, 0).reshape(self.tensor.shape[self.dim], -1) == 0
        ).all(dim=1)
        return empty.cpu()[self.index].flatten(0, 1).all(dim=0)

    def taken(self, units: Units) -> Tensor:
        """Return the tensor without the other units."""
        return self.like(self.tensor.detach().index_select(self.dim, self.where(units)))

    def like(self, new: Tensor) -> Tensor:
        """Return a tensor as a parameter if this one is a parameter."""
        return (
            nn.Parameter(new, self.tensor.requires_grad)
            if isinstance(self.tensor, nn.Parameter)
            else new
        )

    def where(self, units: Units) -> Tensor:
        """Return the positions of units."""
        return self.index[..., units.cpu()].flatten().sort().values.to(self.tensor.device)


def replace_attributes(values: Iterable[tuple[nn.Module, str, Any]]) -> Callable[[], None]:
    """Set attributes of modules one after the other, and return a function that undoes it."""
    before = []
    for module, name, value in values:
        before.append((module, name, getattr(module, name)))
        setattr(module, name, value)
    torch.clear_autocast_cache()  # it holds casts of the weights
    return partial(replace_attributes, before[::-1])  # type: ignore[return-value]


@dataclass(frozen=True)
class HiddenUnits:
    """Hidden units, where they are written and where they are read."""

    reader: Layer
    # Rows of the writers, other parameters with one value for each unit, and the columns of the reader.
    slots: tuple[Slot, ...]
    # That the units enter on their way, such as depthwise convolutions.
    inner: frozenset[nn.Module] = frozenset()

    def permute(self, orders: Orders) -> None:
        """Permute the units of each head, in place; units stay within their head."""
        for slot in self.slots:
            tensor = slot.tensor.detach()
            tensor.copy_(tensor.index_select(slot.dim, slot.source(orders).to(tensor.device)))
        torch.clear_autocast_cache()  # it holds casts of the weights in their old order

    @property
    def columns(self) -> Tensor:
        """The columns of the reader, (heads, copies, units)."""
        return self.slots[-1].index

    def source(self, orders: Orders) -> Tensor:
        """Return, for each column of the reader, the column that it was before `permute`."""
        return self.slots[-1].source(orders)


def hidden_units(reader: Layer, parent: nn.Module, block: nn.Module) -> Iterator[HiddenUnits]:
    """Yield candidates for the hidden units that a plain layer reads, the likeliest first.

    Their writers are sought in the module that contains the layer (`parent`), then in its block. Nothing is proposed if
    the block has adapters: they were trained for this order and width.
    """
    d_in = reader.shape[1]
    if adapted_module(block) is not None:
        return
    vectors = [
        (module, name)
        for module in parent.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.shape == (d_in,) and name != "bias"
    ]
    proposed: set[object] = set()
    for scope in dict.fromkeys((parent, block)):
        layers = [layer for layer in whole_layers(scope, reader) if is_plain(layer)]
        of_mlp = ((None, written) for written in written_units(d_in, layers))
        for columns, written in (*of_mlp, *_of_heads(d_in, layers, block)):
            key = tuple(slot.key for slot in written)
            if key in proposed:
                continue
            proposed.add(key)
            last = columns_of(reader, columns)
            yield HiddenUnits(reader, (*written, last))
            if vectors:  # such as the weight of a norm between writer and reader
                extra = (Slot(module, name, 0, columns) for module, name in vectors)
                yield HiddenUnits(reader, (*written, *extra, last))


def whole_layers(scope: nn.Module, reader: Layer) -> list[Layer]:
    """Return the modules that are whole layers, but not the reader."""
    return [
        layer
        for module in scope.modules()
        if (layer := whole_layer(module)) and module is not reader.module
    ]


def written_units(width: int, layers: Sequence[Layer]) -> Iterator[tuple[Slot, ...]]:
    """Propose hidden units without heads, written by one layer or, with a gate, by two or one with twice the rows."""
    same = [layer for layer in layers if layer.shape[0] == width]
    for writers in (same, *([layer] for layer in same if len(same) > 1)):
        if writers:
            yield tuple(slot for layer in writers for slot in _rows(layer))
    for layer in layers:
        if layer.shape[0] == 2 * width:
            halves = torch.arange(2 * width)
            yield _rows(layer, halves.reshape(1, 2, width))
            yield _rows(layer, halves.reshape(1, width, 2).transpose(1, 2))


def _of_heads(
    d_in: int, layers: Sequence[Layer], block: nn.Module
) -> Iterator[tuple[Tensor, tuple[Slot, ...]]]:
    """Propose the values of attention heads, written by a layer of their own or together with queries and keys."""
    for size in _attributes(block, _HEAD_SIZES):
        if size < 2 or d_in % size:
            continue
        heads = d_in // size
        for layer in layers:
            d_out = layer.shape[0]
            found = [
                d_out // size,
                heads,
                (d_out // size - heads) // 2,
                *_attributes(block, _KV_HEADS),
            ]
            for kv_heads in dict.fromkeys(
                count for count in found if count > 0 and not heads % count
            ):
                if d_out < kv_heads * size:
                    continue
                columns = torch.arange(d_in).reshape(kv_heads, -1, size)
                last = torch.arange(d_out - kv_heads * size, d_out).reshape(kv_heads, 1, size)
                yield columns, _rows(layer, last)
                # Each head's queries and keys, then its values.
                if d_out % kv_heads == 0 and d_out > kv_heads * size:
                    yield (
                        columns,
                        _rows(layer, torch.arange(d_out).reshape(kv_heads, 1, -1)[..., -size:]),
                    )


def _rows(layer: Layer, places: Tensor | None = None) -> tuple[Slot, ...]:
    """Return the rows of a layer, and the entries of its bias."""
    slots = [Slot(layer.module, "weight", 0 if layer.kind.rows_first else 1, places)]
    if isinstance(getattr(layer.module, "bias", None), Tensor):
        slots.append(Slot(layer.module, "bias", 0, places))
    return tuple(slots)


def columns_of(layer: Layer, places: Tensor | None = None) -> Slot:
    """Return the columns of a layer: its input channels."""
    return Slot(layer.module, "weight", 1 if layer.kind.rows_first else 0, places)


def _attributes(block: nn.Module, names: Sequence[str]) -> list[int]:
    """Return the whole numbers that modules of a block store under one of the names."""
    found = (getattr(module, name, None) for module in block.modules() for name in names)
    return list(dict.fromkeys(value for value in found if type(value) is int))


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
        """The matrices that write or read the units; the last is the reader's.

        A unit with zeros in all of them can be taken out. What lies in between, such as biases and depthwise
        convolutions, may be anything: what the unit computes from it meets zeros only.
        """
        return tuple(
            s for s in self.slots if s.tensor.ndim > 1 and not _is_depthwise(s.module, self.width)
        )

    @property
    def inner(self) -> frozenset[nn.Module]:
        """The modules with a matrix that the units enter on their way to the reader."""
        matrices = (
            (slot, whole_layer(slot.module)) for slot in self.slots[:-1] if slot.tensor.ndim > 1
        )
        return frozenset(
            slot.module
            for slot, own in matrices
            if own is None or slot.line == columns_of(own).line
        )

    def zero(self, units: Units) -> None:
        """Set all parameters of some units to zero; running statistics stay."""
        for slot in self.slots:
            if isinstance(slot.tensor, nn.Parameter):
                slot.tensor.detach().index_fill_(slot.dim, slot.where(units), 0)
        torch.clear_autocast_cache()  # it holds casts of the weights

    def take(self, units: Units) -> Callable[[], None]:
        """Take all other units out, in place, and return a function that puts the tensors and widths back."""
        return replace_attributes(self._without(units))

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Undo `zero` and `take` at the end of this block, in which the modules have copies of the tensors."""
        with ExitStack() as stack:
            stack.callback(self.take(torch.ones(self.width, dtype=torch.bool)))
            yield

    def _without(self, units: Units) -> Iterator[tuple[nn.Module, str, Any]]:
        """Yield new tensors and widths, each after the one before is set: a tensor may have two slots."""
        number = int(units.sum())
        for slot in self.slots:
            new = slot.taken(units)
            names = _VECTORS
            if layer := whole_layer(slot.module):
                names = _INPUTS if slot.line == columns_of(layer).line else _OUTPUTS
            yield from _resized(
                slot.module, names, slot.tensor.shape[slot.dim], new.shape[slot.dim]
            )
            yield slot.module, slot.name, new
        for parent in self.parents:
            yield from _resized(parent, _AROUND, self.width, number)
            yield from _resized(parent, _AROUND, 2 * self.width, 2 * number)


def _resized(
    module: nn.Module, names: frozenset[str], before: int, after: int
) -> list[tuple[nn.Module, str, int]]:
    return [
        (module, name, after)
        for name in names & vars(module).keys()
        if getattr(module, name) == before
    ]


def removable_units(reader: Layer, parent: nn.Module, block: nn.Module) -> Iterator[RemovableUnits]:
    """Yield candidates for the hidden units that a layer reads, the likeliest first.

    They are sought as `hidden_units` seeks them, but may have anything between writers and reader.
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
        readers = [
            columns_of(layer)
            for layer in layers
            if layer.width == width and layer.size <= reader.size
        ]
        end = index.get(reader.module, len(index))
        for written in sorted(
            written_units(width, layers), key=partial(_remoteness, index=index, end=end)
        ):
            first = min(index[slot.module] for slot in written)
            between = [slot for slot in vectors if first < index[slot.module] < end]
            inner = [slot for slot in readers if first < index[slot.module] < end]
            for more in (between, [*between, *inner], vectors, [*vectors, *readers], []):
                slots = (*written, *more, columns_of(reader))
                key = tuple(slot.key for slot in slots)
                if key not in proposed:
                    proposed.add(key)
                    others = [
                        layer for layer in layers if layer.module in {slot.module for slot in slots}
                    ]
                    yield RemovableUnits(
                        reader, tuple(others), width, slots, tuple(dict.fromkeys((parent, scope)))
                    )


def _remoteness(
    written: Sequence[Slot], index: Mapping[nn.Module, int], end: int
) -> tuple[int, bool, int]:
    """Order proposals for the writers of units: the fewest first, then the nearest before the reader at `end`.

    More writers than needed fit, too, if parts of a model are alike, but then all lose the units that one loses.
    """
    last = max(index[slot.module] for slot in written)
    return len({slot.module for slot in written}), last > end, abs(end - last)


def _carried(scope: nn.Module, width: int) -> Iterator[Slot]:
    """Yield what has one entry for each unit, such as BatchNorm and depthwise convolutions."""
    for module in scope.modules():
        if _is_depthwise(module, width):
            yield from (
                Slot(module, name, 0)
                for name in ("weight", "bias")
                if getattr(module, name) is not None
            )
        elif whole_layer(module) is None:
            yield from (
                Slot(module, name, 0)
                for name, tensor in own_tensors(module)
                if tensor.shape == (width,)
            )


def _is_depthwise(module: nn.Module, width: int) -> bool:
    if not isinstance(module, nn.Conv1d | nn.Conv2d):
        return False
    return module.groups == module.in_channels == module.out_channels == width
