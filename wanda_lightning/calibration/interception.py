"""Intercept every multiplication by a layer's weight, including those outside the layer's own forward.

Many models read the weight of a layer without calling the layer: attention passes its projections to one fused
function, Mamba multiplies from the left, and experts are slices of one parameter. Hooks of modules do not see these
products. A torch-function mode sees every call of a PyTorch function, and recognizes a weight by its memory.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from wanda_lightning.calibration.pruning_mode import patched
from wanda_lightning.calibration.torch_internals import is_transformed, visible_attention
from wanda_lightning.common.grouping import grouped
from wanda_lightning.core.placeholders import is_unloaded
from wanda_lightning.models import Layer


class Product(NamedTuple):
    """A multiplication of tokens by the matrix of one layer, possibly one expert of a batched product.

    In a product of several experts each expert gets all tokens; the model zeroes the tokens of other experts before, or
    their outputs afterwards.
    """

    layer: Layer
    tokens: Tensor  # the tensor that the matrix multiplies, or this layer's slice of it
    # Index of the layer's slice of the output; None if the whole output is the layer's.
    slot: int | None = None
    # The first row of the matrix in this product, if a model multiplies by pieces of it.
    row: int = 0
    left: bool = False  # the matrix is the left factor, so the columns of the output are tokens
    # (steps, samples) if the output is ordered by step, then by sample.
    time_first: tuple[int, int] | None = None

    def own_output(self, output: Tensor) -> Tensor:
        """Return this layer's part of the product's output, or of its gradient."""
        if self.left:
            return output.mT
        if self.time_first:
            return output.unflatten(0, self.time_first).transpose(0, 1)
        if self.slot is None:
            return output
        return output.select(-3, self.slot)


Multiply = Callable[[], Tensor]
"""Computes a product."""

OnProduct = Callable[[list[Product], Multiply], Tensor]

_PRODUCTS_WITH_BIAS = {torch.addmm, torch.baddbmm, Tensor.addmm, Tensor.baddbmm}
_MATMULS = {
    torch.matmul,
    torch.mm,
    torch.bmm,
    Tensor.matmul,
    Tensor.__matmul__,
    Tensor.mm,
    Tensor.bmm,
}
PRODUCTS = {F.linear, *_MATMULS, *_PRODUCTS_WITH_BIAS}


class WeightInterceptor(TorchFunctionMode):
    """Mode that calls `on_product` in place of each product of tokens and a layer's matrix.

    A product is recognized if one factor is the parameter or a view of it, as in every loop over experts of
    transformers and wherever a module reads the weight of a layer that it does not call. Products with copies of a
    weight (gathered or cast), products inside custom kernels, and convolutions outside their layer are not recognized.
    `on_product` gets the products of one multiplication and a function that computes it, and returns its result.
    """

    def __init__(self, layers: Iterable[Layer], on_product: OnProduct) -> None:
        super().__init__()
        self._on_product = on_product
        self.memory = WeightMemory(layers)  # empty if no weight can be recognized
        self._in_a_forward = False  # of a layer, which is one product as a whole
        # Numbers of steps and samples of what attention gets.
        self._steps_and_samples: tuple[int, int] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function, or `on_product` if it is a product with a layer's matrix."""
        kwargs = kwargs or {}
        call = partial(func, *args, **kwargs)
        if self._in_a_forward:
            return call()
        if func in PRODUCTS:
            return self._multiply(func, call, *_factors(func, args, kwargs))
        if func is F.multi_head_attention_forward:
            return self._attend(*args, **kwargs)
        return call()

    def _multiply(self, func: Any, call: Multiply, first: Any, second: Any) -> Tensor:
        """Compute a product, which may be one of tokens and a weight, or of a weight and tokens."""
        if not (_is_plain(first) and _is_plain(second) and second.ndim > 1):
            return call()
        # `F.linear` takes the weight as (rows, inputs); the others take it as a right factor (inputs, rows).
        products = self._products(first, second.mT if func is F.linear else second)
        if not products and func is not F.linear and first.ndim == 2:
            # Mamba multiplies from the left: W x is the transpose of x' W'.
            transposed = self._products(second.mT, first.mT)
            products = [product._replace(left=True) for product in transposed]
        return self._on_product(products, call) if products else call()

    def _attend(self, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run attention so that this mode sees the products with its weights."""
        # The query is (steps, samples, features), or (steps, features) without a batch.
        steps, samples, *_ = query.shape
        self._steps_and_samples = (steps, samples) if query.ndim == 3 else None
        try:
            with self:  # PyTorch turns a mode off inside its `__torch_function__`
                return visible_attention(query, *args, **kwargs)
        finally:
            self._steps_and_samples = None

    def by_forward(
        self, layers: Sequence[Layer], forward: Callable[..., Tensor], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Treat the forward of a module as the product with its layer, or with all groups of a convolution."""
        tokens = input_of(args, kwargs)
        products = [Product(layer, tokens) for layer in layers]
        outer = self._in_a_forward
        self._in_a_forward = True
        try:
            return self._on_product(products, partial(forward, *args, **kwargs))
        finally:
            self._in_a_forward = outer

    def _products(self, tokens: Tensor, weight: Tensor) -> list[Product]:
        """Return the products in `tokens @ weight`; none if the weight is no view of a layer's weight."""
        matches = self.memory.matches(weight)
        if not matches or tokens in self.memory:  # a product of two weights has no tokens
            return []
        if matches[0].slot is not None:
            return _products_of_experts(tokens, len(weight), matches)

        product = Product(matches[0].layer, tokens, row=matches[0].row)
        order = self._steps_and_samples
        if order and tokens.ndim == 2 and len(tokens) == math.prod(order):
            # Samples first, as in padding masks.
            samples = tokens.unflatten(0, order).transpose(0, 1)
            product = product._replace(tokens=samples, time_first=order)
        return [product]


def _products_of_experts(tokens: Tensor, count: int, matches: Sequence[Match]) -> list[Product]:
    """Return a product for each expert in a batch of `count` matrices, whose tokens may be the same for all."""
    if tokens.ndim == 2:
        tokens = tokens.unsqueeze(0)
    tokens = tokens.expand(*tokens.shape[:-3], count, *tokens.shape[-2:])
    return [
        Product(match.layer, tokens.select(-3, match.slot or 0), match.slot, match.row)
        for match in matches
    ]


def _factors(func: Any, args: tuple[Any, ...], kwargs: Any) -> tuple[Any, Any]:
    """Return the two factors of a product; the libraries whose models are tested name only those of `F.linear`."""
    factors = args[1:3] if func in _PRODUCTS_WITH_BIAS else args[:2]
    named = [kwargs[name] for name in ("input", "weight") if name in kwargs]
    first, second, *_ = (*factors, *named, None, None)
    return first, second


def _is_plain(tensor: Any) -> TypeGuard[Tensor]:
    """Whether it is a dense tensor with memory: not quantized, sparse, on the meta device or in a transform."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and not tensor.is_meta
        and tensor.layout is torch.strided
        and not is_transformed(tensor)
    )


@contextmanager
def intercept(layers: Sequence[Layer], on_product: OnProduct) -> Iterator[None]:
    """Call `on_product` in place of each product with a layer's weight in this block.

    This includes the forward of the layer's module and every product outside it (see `WeightInterceptor`).
    """
    interceptor = WeightInterceptor(layers, on_product)
    whole = [layer for layer in layers if layer.expert is None]
    modules = grouped(whole, attrgetter("module"))  # all groups of a convolution
    with ExitStack() as entered:
        for module, layers_of_module in modules.items():
            by_forward = partial(interceptor.by_forward, layers_of_module, module.forward)
            entered.enter_context(patched(module, "forward", by_forward))
        if interceptor.memory:
            entered.enter_context(interceptor)
        yield


def input_of(args: Any, kwargs: Any) -> Tensor:
    """Return the input that a layer was called with, by position or by any keyword."""
    tokens: Tensor = args[0] if args else next(iter(kwargs.values()))
    return tokens


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
    not loaded until `weights_moved` is called.
    """

    def __init__(self, layers: Iterable[Layer]) -> None:
        self._layers = [layer for layer in layers if _has_matrix(layer)]
        self._read()

    def _read(self) -> None:
        """Find out where the weights are."""
        self._moves = _moves
        stacks = {}
        for layer in self._layers:
            weight = layer.parameter.detach()
            if is_unloaded(weight):
                continue
            start = weight.data_ptr()
            if start not in stacks:
                end = start + weight.numel() * weight.element_size()
                matrices = weight if weight.ndim == 3 else weight.unsqueeze(0)
                on_meta = torch.empty_strided(
                    matrices.shape, matrices.stride(), dtype=matrices.dtype, device="meta"
                )
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

        # Where the factor begins: in which matrix of the parameter, and in which row of that.
        stride = stack.weight.stride(0)
        offset = (weight.data_ptr() - stack.start) // weight.element_size()
        number, offset_in_matrix = divmod(offset, stride)
        matrix = next(iter(stack.layers.values())).kind.read(stack.weight[0])
        row, rest = divmod(offset_in_matrix, matrix.stride(0))

        has_all_inputs = weight.shape[-2] == matrix.shape[1] and weight.stride(-2) == matrix.stride(
            1
        )
        if rest or not has_all_inputs:
            return []
        if weight.ndim == 2:
            return [Match(stack.layers[number], None, row)] if number in stack.layers else []
        if weight.stride(0) != stride:
            return []
        return [
            Match(stack.layers[number + index], index, row)
            for index in range(len(weight))
            if number + index in stack.layers
        ]

    def _stack_of(self, tensor: Tensor) -> _Stack | None:
        """Return the parameter in whose memory a tensor begins."""
        if self._moves != _moves:
            self._read()
        if not self._stacks:
            return None
        pointer = tensor.data_ptr()
        index = bisect_right(self._starts, pointer) - 1
        if index < 0:
            return None
        stack = self._stacks[index]
        is_inside = pointer < stack.end and tensor.dtype == stack.weight.dtype
        return stack if is_inside else None


def _has_matrix(layer: Layer) -> bool:
    """Whether the parameter of a layer is a matrix in memory, or has one for each expert."""
    weight = layer.parameter
    dimensions = 2 if layer.expert is None else 3
    return weight.ndim == dimensions and _is_plain(weight.detach()) and weight.numel() > 0
