"""Identify by its memory the layer whose weight a tensor is a view of."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from wanda_lightning.core.placeholders import is_unloaded
from wanda_lightning.models import Layer


class _Stack(NamedTuple):
    """The memory of one parameter, which holds one matrix or one for each expert."""

    start: int
    end: int
    weight: Tensor  # on the meta device: the weight itself would stay in memory after it is freed
    layers: dict[int, Layer]


class Match(NamedTuple):
    """A layer whose matrix a tensor is a view of."""

    layer: Layer
    slot: int | None  # index in a batch of matrices; None if the tensor is a single matrix
    row: int  # the first row of the matrix in the view


_moves = 0  # how often weights were loaded or freed


def weights_moved() -> None:
    """Invalidate every `WeightMemory` after loading or freeing weights."""
    global _moves
    _moves += 1


class WeightMemory:
    """The memory ranges of the weights of some layers.

    Convolutions and weights on the meta device have no plain matrix in memory and are left out, as are weights that are
    not loaded, or sharded and not gathered, until `weights_moved` is called.
    """

    def __init__(self, layers: Iterable[Layer]) -> None:
        self._layers = [layer for layer in layers if _is_plain(layer)]
        self.has_experts = any(layer.expert is not None for layer in self._layers)
        self.is_sharded = any(isinstance(layer.parameter, DTensor) for layer in self._layers)
        self._read()

    def _read(self) -> None:
        self._moves = _moves
        stacks: dict[int, _Stack] = {}
        for layer in self._layers:
            if isinstance(layer.parameter, DTensor) or is_unloaded(weight := layer.parameter.detach()):
                continue
            start, end = weight.data_ptr(), weight.data_ptr() + weight.numel() * weight.element_size()
            if start not in stacks:
                matrices = weight if weight.ndim == 3 else weight.unsqueeze(0)
                on_meta = torch.empty_strided(matrices.shape, matrices.stride(), dtype=matrices.dtype, device="meta")
                stacks[start] = _Stack(start, end, on_meta, {})
            stacks[start].layers[layer.expert or 0] = layer
        self._starts = sorted(stacks)
        self._stacks = [stacks[start] for start in self._starts]

    def __len__(self) -> int:
        return len(self._layers)

    def __contains__(self, tensor: Tensor) -> bool:
        return self._stack_of(tensor) is not None

    def matches(self, weight: Tensor) -> list[Match]:
        """Return the layers whose matrix, or whole rows of it, form a factor (d_in, rows) or (experts, d_in, rows)."""
        if weight.ndim == 3 and weight.stride(0) == 0:
            weight = weight[0]  # one matrix, expanded
        stack = self._stack_of(weight)
        if stack is None or weight.ndim not in (2, 3):
            return []
        stride = stack.weight.stride(0)
        number, rest = divmod((weight.data_ptr() - stack.start) // weight.element_size(), stride)
        matrix = next(iter(stack.layers.values())).kind.read(stack.weight[0])
        all_inputs = weight.shape[-2] == matrix.shape[1] and weight.stride(-2) == matrix.stride(1)
        if not all_inputs or rest % matrix.stride(0) or (weight.ndim == 3 and weight.stride(0) != stride):
            return []
        row = rest // matrix.stride(0)
        if weight.ndim == 2:
            return [Match(stack.layers[number], None, row)] if number in stack.layers else []
        return [
            Match(stack.layers[number + index], index, row)
            for index in range(len(weight))
            if number + index in stack.layers
        ]

    def _stack_of(self, tensor: Tensor) -> _Stack | None:
        if self._moves != _moves:
            self._read()
        if not self._stacks:
            return None
        pointer = tensor.data_ptr()
        index = bisect_right(self._starts, pointer) - 1
        stack = self._stacks[index] if index >= 0 else None
        return stack if stack and pointer < stack.end and tensor.dtype == stack.weight.dtype else None


def _is_plain(layer: Layer) -> bool:
    weight = layer.parameter.detach()
    dimensions = 2 if layer.expert is None else 3
    return type(weight) in (Tensor, DTensor) and not weight.is_meta and weight.ndim == dimensions and weight.numel() > 0
