"""Find hidden units that can perhaps be permuted: outputs of some layers that a single other layer reads.

A permutation of hidden units permutes rows of the layers that write them, with their biases, and columns of the layer
that reads them. This file proposes candidates by shapes alone. The caller measures which of them are right, so no table
of model families is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wanda_lightning.core.types import Orders
from wanda_lightning.models.adapters import adapted_module
from wanda_lightning.models.layers import Layer, is_plain, kind_of

_HEAD_SIZES = ("head_dim", "attention_head_size", "head_size", "v_head_dim", "d_head", "key_value_proj_dim")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads")


@dataclass(frozen=True)
class Place:
    """The positions of hidden units in one tensor of a module."""

    module: nn.Module
    name: str  # of the tensor
    dim: int  # along which the units lie
    index: Tensor  # (heads, copies, units): heads that share their values read copies of them

    def permute(self, orders: Orders) -> None:
        """Permute the units of each head."""
        tensor = getattr(self.module, self.name).detach()
        source = _sources(tensor.shape[self.dim], self.index, orders)
        tensor.copy_(tensor.index_select(self.dim, source.to(tensor.device)))


@dataclass(frozen=True)
class HiddenUnits:
    """Hidden units, where they are written and where they are read."""

    reader: Layer
    columns: Tensor  # of the reader, (heads, copies, units)
    written: tuple[Place, ...]  # rows of the writers, and other parameters with one value for each unit

    @property
    def places(self) -> tuple[Place, ...]:
        """Everywhere that they are written and read."""
        return *self.written, Place(self.reader.module, "weight", _dim(self.reader, of_rows=False), self.columns)

    def permute(self, orders: Orders) -> None:
        """Permute the units of each head, in place; units stay within their head."""
        for place in self.places:
            place.permute(orders)
        torch.clear_autocast_cache()  # it holds casts of the weights in their old order

    def source(self, orders: Orders) -> Tensor:
        """Return, for each column of the reader, the column that it was before `permute`."""
        return _sources(self.reader.shape[1], self.columns, orders)


def hidden_units(reader: Layer, parent: nn.Module, block: nn.Module) -> Iterator[HiddenUnits]:
    """Yield candidates for the hidden units that a plain layer reads, the likeliest first.

    Their writers are sought in the module that contains the layer (`parent`), then in its block. Nothing is proposed if
    the block has adapters: they were trained for this order.
    """
    d_in = reader.shape[1]
    if adapted_module(block) is not None:
        return
    vectors = [
        (module, name)
        for module in parent.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if tuple(parameter.shape) == (d_in,) and name != "bias"
    ]
    proposed: set[object] = set()
    for scope in dict.fromkeys((parent, block)):
        layers = [layer for module in scope.modules() if (layer := _writer(module)) and module is not reader.module]
        for columns, written in (*_of_mlp(d_in, layers), *_of_heads(d_in, layers, block)):
            key = tuple((id(p.module), p.name, p.index.shape, p.index.numpy().tobytes()) for p in written)
            if key in proposed:
                continue
            proposed.add(key)
            yield HiddenUnits(reader, columns, written)
            if vectors:  # such as the weight of a norm between writer and reader
                extra = (Place(module, name, 0, columns) for module, name in vectors)
                yield HiddenUnits(reader, columns, (*written, *extra))


def _of_mlp(d_in: int, layers: Sequence[Layer]) -> Iterator[tuple[Tensor, tuple[Place, ...]]]:
    """Propose hidden units without heads, written by one layer or, with a gate, by two or one with twice the rows."""
    columns = torch.arange(d_in).reshape(1, 1, d_in)
    same = [layer for layer in layers if layer.shape[0] == d_in]
    for writers in (same, *([layer] for layer in same if len(same) > 1)):
        if writers:
            yield columns, tuple(place for layer in writers for place in _rows(layer, columns))
    for layer in layers:
        if layer.shape[0] == 2 * d_in:
            halves = torch.arange(2 * d_in)
            yield columns, _rows(layer, halves.reshape(1, 2, d_in))
            yield columns, _rows(layer, halves.reshape(1, d_in, 2).transpose(1, 2))


def _of_heads(d_in: int, layers: Sequence[Layer], block: nn.Module) -> Iterator[tuple[Tensor, tuple[Place, ...]]]:
    """Propose the values of attention heads, written by a layer of their own or together with queries and keys."""
    for size in _attributes(block, _HEAD_SIZES):
        if size < 2 or d_in % size:
            continue
        heads = d_in // size
        for layer in layers:
            d_out = layer.shape[0]
            found = [d_out // size, heads, (d_out // size - heads) // 2, *_attributes(block, _KV_HEADS)]
            for kv_heads in dict.fromkeys(count for count in found if count > 0 and not heads % count):
                if d_out < kv_heads * size:
                    continue
                columns = torch.arange(d_in).reshape(kv_heads, -1, size)
                last = torch.arange(d_out - kv_heads * size, d_out).reshape(kv_heads, 1, size)
                yield columns, _rows(layer, last)
                if d_out % kv_heads == 0 and d_out > kv_heads * size:  # each head's queries and keys, then its values
                    yield columns, _rows(layer, torch.arange(d_out).reshape(kv_heads, 1, -1)[..., -size:])


def _sources(size: int, index: Tensor, orders: Orders) -> Tensor:
    """Return the old position of each of `size` entries after the units at `index` are put into a new order."""
    source = torch.arange(size)
    chosen = orders.cpu().unsqueeze(1).expand(index.shape)
    source[index.flatten()] = index.gather(2, chosen).flatten()
    return source


def _rows(layer: Layer, index: Tensor) -> tuple[Place, ...]:
    """Return the rows of a layer, and the entries of its bias."""
    places = [Place(layer.module, "weight", _dim(layer, of_rows=True), index)]
    if isinstance(getattr(layer.module, "bias", None), Tensor):
        places.append(Place(layer.module, "bias", 0, index))
    return tuple(places)


def _dim(layer: Layer, of_rows: bool) -> int:
    """Return the dimension of rows or columns in the layout of the weight."""
    return 0 if layer.kind.rows_first == of_rows else 1


def _writer(module: nn.Module) -> Layer | None:
    kind = kind_of(module)
    layer = Layer("", module, kind) if kind else None
    return layer if layer and getattr(module, "groups", 1) == 1 and is_plain(layer) else None


def _attributes(block: nn.Module, names: Sequence[str]) -> list[int]:
    """Return the whole numbers that modules of a block store under one of the names."""
    found = (getattr(module, name, None) for module in block.modules() for name in names)
    return list(dict.fromkeys(value for value in found if type(value) is int))
