"""Watch experts that are one parameter of three dimensions, and help those that saw few tokens."""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from wanda_lightning.core.statistics import InputStatistics
from wanda_lightning.models import Layer


class Product(NamedTuple):
    """Tokens times an expert's matrix; where the model multiplies several experts at once, those of one of them.

    Attributes:
        layer: The expert.
        tokens: What it multiplies: the tensor itself, or its part of it.
        place: Which part of the output is its; None is all of it. Of several experts at once each is given all tokens,
            and those that are not its are zeros, or are taken out afterwards.
        first: Whether the expert's first row is multiplied: of several pieces of it, one counts.
    """

    layer: Layer
    tokens: Tensor
    place: int | None
    first: bool

    def part(self, output: Tensor) -> Tensor:
        """What of an output, or of its gradient, is that of this expert."""
        return output if self.place is None else output.select(-3, self.place)


class _Stack(NamedTuple):
    """Where in memory the experts of one parameter are."""

    end: int
    weight: Tensor
    layers: dict[int, Layer]


_PRODUCTS = {F.linear, torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm}
_GATHERS = {Tensor.__getitem__, torch.index_select, Tensor.index_select}
_GATHERED = 8  # how many of the last ones may still be multiplied


class ExpertProducts(TorchFunctionMode):
    """While this is entered, hears of each product of tokens and an expert's matrix, whatever code it is in.

    A matrix is recognised by its memory: the product is with a view of the parameter, as in every loop over experts of
    transformers. What multiplies copies (gathered matrices), or by a kernel of its own, is not heard of.

    Args:
        layers: The experts.
        hear: Called after each multiplication, with its output; what it returns takes the output's place.
    """

    def __init__(self, layers: Iterable[Layer], hear: Callable[[list[Product], Tensor], Tensor]) -> None:
        super().__init__()
        self._hear = hear
        self._gathered: deque[tuple[weakref.ref[Tensor], weakref.ref[Tensor], Tensor]] = deque(maxlen=_GATHERED)
        stacks: dict[int, _Stack] = {}
        for layer in layers:
            if layer.expert is not None:
                weight = layer.parameter.detach()
                end = weight.data_ptr() + weight.numel() * weight.element_size()
                stacks.setdefault(weight.data_ptr(), _Stack(end, weight, {})).layers[layer.expert] = layer
        self._starts = sorted(stacks)
        self._stacks = [stacks[start] for start in self._starts]

    @property
    def watches(self) -> bool:
        """Whether there are any experts to hear of."""
        return bool(self._stacks)

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call it, and look at what it was if it was a product."""
        output = func(*args, **(kwargs or {}))
        if func in _PRODUCTS:
            x, weight, *_ = (*args, *(kwargs or {}).values())
            if products := self._products(x, weight.mT if func is F.linear and weight.ndim > 1 else weight):
                return self._hear(products, output)
        elif func in _GATHERS and (len(args) == 2 or (len(args) == 3 and args[1] == 0)):
            index = args[-1][0] if isinstance(args[-1], tuple) and len(args[-1]) == 1 else args[-1]
            if isinstance(index, Tensor) and index.ndim == 1:
                self._gathered.append((weakref.ref(output), weakref.ref(args[0]), index))
        return output

    def rows_of(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """If a tensor was gathered from rows of another, that one and which rows."""
        for output, source, index in self._gathered:
            if output() is x and (whole := source()) is not None:
                return whole, index
        return None

    def _products(self, x: Tensor, weight: Tensor) -> list[Product]:
        """Of `x @ weight`, where the weight is memory of experts: some or all of their rows, with all inputs."""
        stack = self._stack_of(weight)
        if stack is None or weight.ndim not in (2, 3):
            return []
        stride = stack.weight.stride(0)
        number, rest = divmod((weight.data_ptr() - stack.weight.data_ptr()) // weight.element_size(), stride)
        matrix = next(iter(stack.layers.values())).kind.read(stack.weight[0])
        all_inputs = weight.shape[-2] == matrix.shape[1] and weight.stride(-2) == matrix.stride(1)
        if not all_inputs or rest % matrix.stride(0) or (weight.ndim == 3 and weight.stride(0) != stride):
            return []
        if weight.ndim == 2:
            return [Product(stack.layers[number], x, None, not rest)] if number in stack.layers else []
        each = x if x.ndim > 2 else x.unsqueeze(0)
        each = each.expand(*each.shape[:-3], len(weight), *each.shape[-2:])
        return [
            Product(stack.layers[number + place], each.select(-3, place), place, not rest)
            for place in range(len(weight))
            if number + place in stack.layers
        ]

    def _stack_of(self, weight: Tensor) -> _Stack | None:
        if not self._stacks or type(weight) not in (Tensor, torch.nn.Parameter):
            return None
        pointer = weight.data_ptr()
        index = bisect_right(self._starts, pointer) - 1
        stack = self._stacks[index] if index >= 0 else None
        return stack if stack and pointer < stack.end and weight.dtype == stack.weight.dtype else None


def pool(
    layers: Sequence[Layer], statistics: Mapping[str, InputStatistics], minimum: int
) -> tuple[dict[str, InputStatistics], dict[str, int]]:
    """Give experts that saw too few tokens the sums over all that are their siblings.

    Args:
        layers: Of one unit: siblings in another one are not known.
        statistics: Of each layer that was reached.
        minimum: How many tokens are enough; with 0 only experts that saw none are helped.

    Returns:
        The statistics of all; and of those that were helped, how many tokens they had seen themselves.
    """
    families: dict[str, list[str]] = {}
    for layer in layers:
        if layer.siblings:
            families.setdefault(layer.siblings, []).append(layer.name)
    result, helped = dict(statistics), {}
    for names in families.values():
        counts = {name: statistics[name].count if name in statistics else 0 for name in names}
        everything = sum(counts.values())
        few = {name: count for name, count in counts.items() if count < max(minimum, 1) and count < everything}
        if few:
            reached = [statistics[name] for name, count in counts.items() if count]
            total = InputStatistics(reached[0].needs)
            for part in reached:
                total.merge(part)
            result.update(dict.fromkeys(few, total))
            helped.update(few)
    return result, helped
