"""OnProduct of each product of tokens and a layer's weight, by the layer's own forward or past it."""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import FunctionType
from typing import Any, NamedTuple, TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from wanda_lightning.calibration.lockstep import patched
from wanda_lightning.models import Layer


class Product(NamedTuple):
    """Tokens times a layer's matrix; where the model multiplies several experts at once, those of one of them.

    Attributes:
        layer: The layer.
        tokens: What it multiplies: the tensor itself, or its part of it.
        place: Which part of the output is its; None is all of it. Of several experts at once each is given all tokens,
            and those that are not its are zeros, or are taken out afterwards.
        first: Whether the matrix's first row is multiplied: of several pieces of it, one counts.
        left: Whether the matrix stood on the left, so that the output's columns are tokens.
        time_first: Steps and samples, if the output's rows are those of the first step of each sample and so on.
    """

    layer: Layer
    tokens: Tensor
    place: int | None = None
    first: bool = True
    left: bool = False
    time_first: tuple[int, int] | None = None

    def part(self, output: Tensor) -> Tensor:
        """What of an output, or of its gradient, is that of this layer."""
        if self.left:
            return output.mT
        if self.time_first:
            return output.unflatten(0, self.time_first).transpose(0, 1)
        return output if self.place is None else output.select(-3, self.place)


OnProduct = Callable[[list[Product], Callable[[], Tensor]], Tensor]


class _Stack(NamedTuple):
    """Where in memory the matrices of one parameter are: of experts many, else one."""

    end: int
    weight: Tensor
    layers: dict[int, Layer]


_PRODUCTS = {F.linear, torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm}
_SUMS = {torch.addmm, torch.baddbmm, Tensor.addmm, Tensor.baddbmm}  # of a bias and a product
_GATHERS = {Tensor.__getitem__, torch.index_select, Tensor.index_select}
_GATHERED = 8  # how many of the last ones may still be multiplied


class WeightInterceptor(TorchFunctionMode):
    """While this is entered, hears of each product of tokens and a layer's matrix, whatever code it is in.

    A matrix is recognised by its memory: the product is with the parameter or a view of it, as in every loop over
    experts of transformers, or where a module reads the weight of a layer that it does not call. What multiplies copies
    (gathered or cast matrices), or by a kernel of its own, is not intercept of, and convolutions are not.

    Args:
        layers: Those to on_product of.
        on_product: Called in place of each multiplication, with what does it; its result is the product.
    """

    def __init__(self, layers: Iterable[Layer], on_product: OnProduct) -> None:
        super().__init__()
        self._on_product = on_product
        self._in_a_forward = False
        self._attention: tuple[int, int] | None = None
        self._gathered: deque[tuple[weakref.ref[Tensor], weakref.ref[Tensor], Tensor]] = deque(maxlen=_GATHERED)
        stacks: dict[int, _Stack] = {}
        for layer in layers:
            weight = layer.parameter.detach()
            if type(weight) is not Tensor or weight.is_meta or weight.ndim != (2 if layer.expert is None else 3):
                continue  # sharded or elsewhere; or no matrix as it is
            if not weight.numel():
                continue
            end = weight.data_ptr() + weight.numel() * weight.element_size()
            matrices = weight if weight.ndim == 3 else weight.unsqueeze(0)
            stack = stacks.setdefault(weight.data_ptr(), _Stack(end, matrices, {}))
            stack.layers[layer.expert or 0] = layer
        self._starts = sorted(stacks)
        self._stacks = [stacks[start] for start in self._starts]
        self._of_experts = any(len(stack.weight) > 1 for stack in self._stacks)

    @property
    def watches(self) -> bool:
        """Whether there is anything to on_product of."""
        return bool(self._stacks)

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call it, or have it intercept if it is a product."""
        call = partial(func, *args, **(kwargs or {}))
        if self._in_a_forward:
            return call()
        if func in _PRODUCTS or func in _SUMS:
            x, weight = _factors(func, args, kwargs or {})
            if not (_has_memory(x) and _has_memory(weight) and weight.ndim > 1):
                return call()
            if products := self._products(x, weight.mT if func is F.linear else weight):
                return self._on_product(products, call)
            if func is not F.linear and x.ndim == 2 and (products := self._products(weight.mT, x.mT)):
                return self._on_product([product._replace(left=True) for product in products], call)
        elif func is F.multi_head_attention_forward:
            query = args[0] if args else (kwargs or {})["query"]
            self._attention = tuple(query.shape[:2]) if query.ndim == 3 else None
            try:
                with self:
                    return _entered(cast(FunctionType, func))(*args, **(kwargs or {}))
            finally:
                self._attention = None
        elif self._of_experts and func in _GATHERS and (len(args) == 2 or (len(args) == 3 and args[1] == 0)):
            index = args[-1][0] if isinstance(args[-1], tuple) and len(args[-1]) == 1 else args[-1]
            output = call()
            if isinstance(index, Tensor) and index.ndim == 1:
                self._gathered.append((weakref.ref(output), weakref.ref(args[0]), index))
            return output
        return call()

    def by_forward(self, layers: Sequence[Layer], forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """The forward of the module of some layers (one, or the groups of a convolution), intercept as one product."""
        x = input_of(args, kwargs)
        outer, self._in_a_forward = self._in_a_forward, True
        try:
            return self._on_product([Product(layer, x) for layer in layers], partial(forward, *args, **kwargs))
        finally:
            self._in_a_forward = outer

    def rows_of(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """If a tensor was gathered from rows of another, that one and which rows."""
        for output, source, index in self._gathered:
            if output() is x and (whole := source()) is not None:
                return whole, index
        return None

    def _products(self, x: Tensor, weight: Tensor) -> list[Product]:
        """Of `x @ weight`, where the weight is memory of layers: some or all of their rows, with all inputs."""
        if weight.ndim == 3 and weight.stride(0) == 0:
            weight = weight[0]  # one for all
        stack = self._stack_of(weight)
        if stack is None or weight.ndim not in (2, 3) or self._stack_of(x) is not None:  # weights are no tokens
            return []
        stride = stack.weight.stride(0)
        number, rest = divmod((weight.data_ptr() - stack.weight.data_ptr()) // weight.element_size(), stride)
        matrix = next(iter(stack.layers.values())).kind.read(stack.weight[0])
        all_inputs = weight.shape[-2] == matrix.shape[1] and weight.stride(-2) == matrix.stride(1)
        if not all_inputs or rest % matrix.stride(0) or (weight.ndim == 3 and weight.stride(0) != stride):
            return []
        if weight.ndim == 2:
            if number not in stack.layers:
                return []
            product = Product(stack.layers[number], x, None, not rest)
            if self._attention and x.ndim == 2 and len(x) == self._attention[0] * self._attention[1]:
                # Samples first, as padding masks have them.
                samples = x.unflatten(0, self._attention).transpose(0, 1)
                product = product._replace(tokens=samples, time_first=self._attention)
            return [product]
        each = x if x.ndim > 2 else x.unsqueeze(0)
        each = each.expand(*each.shape[:-3], len(weight), *each.shape[-2:])
        return [
            Product(stack.layers[number + place], each.select(-3, place), place, not rest)
            for place in range(len(weight))
            if number + place in stack.layers
        ]

    def _stack_of(self, weight: Tensor) -> _Stack | None:
        if not self._stacks:
            return None
        pointer = weight.data_ptr()
        index = bisect_right(self._starts, pointer) - 1
        stack = self._stacks[index] if index >= 0 else None
        return stack if stack and pointer < stack.end and weight.dtype == stack.weight.dtype else None


def _factors(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """What is multiplied with what, however it was given."""
    names = ("input", "mat1", "mat2") if func in _SUMS else ("input", "mat2")
    others = {"weight": "mat2", "other": "mat2", "batch1": "mat1", "batch2": "mat2", "self": "input"}
    given = dict(zip(names, args, strict=False)) | {others.get(name, name): value for name, value in kwargs.items()}
    return given.get(names[-2]), given.get(names[-1])


def _has_memory(x: object) -> TypeGuard[Tensor]:
    """Whether it is a plain tensor: no sharded or quantised one, nor one that is sparse or under `vmap`."""
    if not isinstance(x, Tensor) or type(x) not in (Tensor, nn.Parameter) or x.is_meta:
        return False
    return x.layout is torch.strided and not torch._C._functorch.is_functorch_wrapped_tensor(x)


def _entered(function: FunctionType) -> FunctionType:
    """A function of `torch.nn.functional` that does not hand itself to a mode as a whole, but what it calls."""
    names = {**function.__globals__, "has_torch_function": lambda tensors: False}
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


@contextmanager
def intercept(layers: Sequence[Layer], on_product: OnProduct) -> Iterator[WeightInterceptor]:
    """While this is entered, `on_product` is called in place of each product with a layer's weight.

    That is the forward of the layer's module, or a product past it (see `WeightInterceptor`).
    """
    products = WeightInterceptor(layers, on_product)
    called: dict[nn.Module, list[Layer]] = {}
    for layer in layers:
        if layer.expert is None:
            called.setdefault(layer.module, []).append(layer)
    with ExitStack() as stack:
        for module, inner in called.items():
            by_forward = partial(products.by_forward, inner, module.forward)
            stack.enter_context(patched(module, "forward", by_forward))
        if products.watches:
            stack.enter_context(products)
        yield products


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a layer was called with."""
    x = args[0] if args else next(iter(kwargs.values()))
    assert isinstance(x, Tensor)
    return x
