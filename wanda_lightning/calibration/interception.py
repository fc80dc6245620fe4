"""Intercept every multiplication by a layer's weight, including those outside the layer's own forward.

Many models read the weight of a layer without calling the layer: attention passes its projections to one fused
function, Mamba multiplies from the left, and experts are slices of one parameter. Hooks of modules do not see these
products. A torch-function mode sees every call of a PyTorch function, and recognizes a weight by its memory.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import FunctionType
from typing import Any, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from wanda_lightning.calibration.pruning_mode import patched
from wanda_lightning.common.errors import UserError
from wanda_lightning.core.placeholders import is_unloaded
from wanda_lightning.models import Layer


class Product(NamedTuple):
    """A multiplication of tokens by the matrix of one layer, possibly one expert of a batched product.

    In a product of several experts each expert gets all tokens; the model zeroes the tokens of other experts before, or
    their outputs afterwards.
    """

    layer: Layer
    tokens: Tensor  # the tensor that the matrix multiplies, or this layer's slice of it
    slot: int | None = (
        None  # index of the layer's slice of the output; None if the whole output is the layer's
    )
    row: int = (
        0  # the first row of the matrix in this product, if a model multiplies by pieces of it
    )
    left: bool = False  # the matrix is the left factor, so the columns of the output are tokens
    time_first: tuple[int, int] | None = (
        None  # (steps, samples) if the output is ordered by step, then by sample
    )

    def own_output(self, output: Tensor) -> Tensor:
        """Return this layer's part of the product's output, or of its gradient."""
        if self.left:
            return output.mT
        if self.time_first:
            return output.unflatten(0, self.time_first).transpose(0, 1)
        return output if self.slot is None else output.select(-3, self.slot)


OnProduct = Callable[[list[Product], Callable[[], Tensor]], Tensor]

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
        self._memory = WeightMemory(layers)
        self._in_a_forward = False
        self._attention: tuple[int, int] | None = None

    @property
    def watches(self) -> bool:
        """Whether any layer has a weight that can be recognized."""
        return len(self._memory) > 0

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call the function, or `on_product` if it is a product with a layer's matrix."""
        kwargs = kwargs or {}
        call = partial(func, *args, **kwargs)
        if self._in_a_forward:
            return call()
        if func in PRODUCTS:
            return self._multiply(func, call, *_factors(func, args, kwargs))
        if func is F.multi_head_attention_forward:
            return self._attend(func, args, kwargs)
        return call()

    def _multiply(self, func: Any, call: Callable[[], Tensor], x: Any, weight: Any) -> Tensor:
        if not (_is_plain(x) and _is_plain(weight) and weight.ndim > 1):
            return call()
        if products := self._products(x, weight.mT if func is F.linear else weight):
            return self._on_product(products, call)
        if func is not F.linear and x.ndim == 2 and (products := self._products(weight.mT, x.mT)):
            return self._on_product([product._replace(left=True) for product in products], call)
        return call()

    def _attend(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run attention so that this mode sees the products with its four weights."""
        query = args[0] if args else kwargs["query"]
        self._attention = tuple(query.shape[:2]) if query.ndim == 3 else None
        try:
            with self:
                return entered_function(func)(*args, **kwargs)
        finally:
            self._attention = None

    def by_forward(
        self, layers: Sequence[Layer], forward: Callable[..., Tensor], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Treat the forward of a module as the product with its layer, or with all groups of a convolution."""
        x = input_of(args, kwargs)
        outer = self._in_a_forward
        self._in_a_forward = True
        try:
            return self._on_product(
                [Product(layer, x) for layer in layers], partial(forward, *args, **kwargs)
            )
        finally:
            self._in_a_forward = outer

    def _products(self, x: Tensor, weight: Tensor) -> list[Product]:
        """Return the products in `x @ weight`; none if the weight is no view of a layer's weight."""
        matches = self._memory.matches(weight)
        if not matches or x in self._memory:  # a product of two weights has no tokens
            return []
        if matches[0].slot is None:
            product = Product(matches[0].layer, x, None, matches[0].row)
            if (
                self._attention
                and x.ndim == 2
                and len(x) == self._attention[0] * self._attention[1]
            ):
                # Samples first, as in padding masks.
                samples = x.unflatten(0, self._attention).transpose(0, 1)
                product = product._replace(tokens=samples, time_first=self._attention)
            return [product]
        each = x if x.ndim > 2 else x.unsqueeze(0)
        each = each.expand(*each.shape[:-3], len(weight), *each.shape[-2:])
        return [
            Product(layer, each.select(-3, slot or 0), slot, row) for layer, slot, row in matches
        ]


def entered_function(function: FunctionType) -> FunctionType:
    """Return a copy of a function of `torch.nn.functional` that lets a torch-function mode see the calls inside it.

    Such a function passes itself to the mode as a whole, and PyTorch disables the mode while the function runs. PyTorch
    has no switch for this, but in the namespace of the copy, `has_torch_function` is always false.
    """
    names = {**function.__globals__, "has_torch_function": lambda tensors: False}
    copy = FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _factors(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Return the two factors of a product, from positional or keyword arguments."""
    names = ("input", "mat1", "mat2") if func in _PRODUCTS_WITH_BIAS else ("input", "mat2")
    others = {
        "weight": "mat2",
        "other": "mat2",
        "batch1": "mat1",
        "batch2": "mat2",
        "self": "input",
    }
    given = dict(zip(names, args, strict=False)) | {
        others.get(name, name): value for name, value in kwargs.items()
    }
    return given.get(names[-2]), given.get(names[-1])


def _is_plain(x: object) -> TypeGuard[Tensor]:
    """Whether x is a dense tensor with memory: not quantized, sparse, on the meta device or under `vmap`."""
    if not isinstance(x, Tensor) or type(x) not in (Tensor, nn.Parameter) or x.is_meta:
        return False
    return x.layout is torch.strided and not torch._C._functorch.is_functorch_wrapped_tensor(x)


@contextmanager
def intercept(layers: Sequence[Layer], on_product: OnProduct) -> Iterator[None]:
    """Call `on_product` in place of each product with a layer's weight in this block.

    This includes the forward of the layer's module and every product outside it (see `WeightInterceptor`).
    """
    interceptor = WeightInterceptor(layers, on_product)
    modules: dict[nn.Module, list[Layer]] = {}
    for layer in layers:
        if layer.expert is None:
            modules.setdefault(layer.module, []).append(layer)
    with ExitStack() as stack:
        for module, inside in modules.items():
            by_forward = partial(interceptor.by_forward, inside, module.forward)
            stack.enter_context(patched(module, "forward", by_forward))
        if interceptor.watches:
            stack.enter_context(interceptor)
        yield


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the input that a layer was called with."""
    x = args[0] if args else next(iter(kwargs.values()))
    if not isinstance(x, Tensor):
        raise UserError(
            f"batches must reach every layer as tensors, but one got a {type(x).__name__}. Give batches as the model's "
            "forward takes them, or give forward=."
        )
    return x


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
        matrices = [
            layer for layer in layers if layer.parameter.ndim == (2 if layer.expert is None else 3)
        ]
        self._layers = [
            x for x in matrices if _is_plain(weight := x.parameter.detach()) and weight.numel()
        ]
        self._read()

    def _read(self) -> None:
        self._moves = _moves
        stacks: dict[int, _Stack] = {}
        for layer in self._layers:
            if is_unloaded(weight := layer.parameter.detach()):
                continue
            start = weight.data_ptr()
            end = weight.data_ptr() + weight.numel() * weight.element_size()
            if start not in stacks:
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
        stride = stack.weight.stride(0)
        number, rest = divmod((weight.data_ptr() - stack.start) // weight.element_size(), stride)
        matrix = next(iter(stack.layers.values())).kind.read(stack.weight[0])
        all_inputs = weight.shape[-2] == matrix.shape[1] and weight.stride(-2) == matrix.stride(1)
        if (
            not all_inputs
            or rest % matrix.stride(0)
            or (weight.ndim == 3 and weight.stride(0) != stride)
        ):
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
        return (
            stack if stack and pointer < stack.end and tensor.dtype == stack.weight.dtype else None
        )
