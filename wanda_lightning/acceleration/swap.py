"""Replace the weights of linear layers by sparse ones, reversibly and without a change of the state dict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanda_lightning.models.placeholders import placeholder


class SparseMatrix(Protocol):
    """A weight in a form that multiplies faster than a dense one."""

    @property
    def nbytes(self) -> int:
        """Number of bytes that a product reads."""

    def accepts(self, inputs: Tensor) -> bool:
        """Whether `linear` can multiply these inputs."""

    def linear(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        """Return `inputs @ weight.T + bias`."""

    def dense(self) -> Tensor:
        """Return the weight as it was, bit for bit."""


class Accelerated:
    """A model whose sparse layers run from sparse weights until `undo()` or the end of a `with` block.

    The model is for inference meanwhile. Its state dict stays as it was, but nothing can be loaded into it.

    Attributes:
        layers: The layers that are accelerated, with their sparse weights.
        dense: The other matrices, with the reason why each stays dense.
    """

    def __init__(self, layers: Mapping[str, SparseMatrix], dense: Mapping[str, str], undo: Callable[[], None]) -> None:
        self.layers, self.dense = layers, dense
        self._undo = undo

    @property
    def nbytes(self) -> int:
        """Number of bytes of the sparse weights."""
        return sum(matrix.nbytes for matrix in self.layers.values())

    def undo(self) -> None:
        """Restore the dense weights, bit for bit, in the same parameters."""
        self._undo()
        self._undo = _nothing

    def __enter__(self) -> Accelerated:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"Accelerated({len(self.layers)} layers; {len(self.dense)} matrices stay dense)"


def accelerate(
    model: nn.Module, name: str, reason: Callable[[Tensor], str | None], convert: Callable[[Tensor], SparseMatrix]
) -> Accelerated:
    """Replace the weights that have no reason to stay dense.

    Args:
        model: Any module.
        name: The function that the user called, for the error message.
        reason: Why a weight must stay dense, or None.
        convert: Makes a sparse weight from a dense one.

    Raises:
        ValueError: If all layers stay dense.
    """
    linears, dense = {}, {}
    for layer, module, why in _matrices(model, reason):
        if why is None:
            linears[layer] = module
        else:
            dense[layer] = why
    if not linears:
        counts = Counter(dense.values()).most_common()
        found = "; ".join(f"{why} ({count})" for why, count in counts) or "the model has no matrix"
        raise ValueError(f"{name} needs at least one layer that it can accelerate, but all stay dense: {found}.")
    undos: list[Callable[[], None]] = []
    layers = {}
    try:
        for layer, module in linears.items():
            layers[layer] = convert(module.weight.data)
            undos.append(_swap(module, layers[layer]))
    except BaseException:
        _call_all(undos)
        raise
    return Accelerated(layers, dense, partial(_call_all, undos))


def _matrices(model: nn.Module, reason: Callable[[Tensor], str | None]) -> Iterator[tuple[str, Any, str | None]]:
    """Yield the name of each matrix, its module, and why it stays dense."""
    named = dict(model.named_parameters(remove_duplicate=False))
    users = Counter(_memory(parameter) for parameter in named.values())
    for path, parameter in named.items():
        owner, _, attribute = path.rpartition(".")
        module = model.get_submodule(owner)
        if parameter.dim() < 2:
            continue
        is_linear = type(module) is nn.Linear and attribute == "weight"
        why: str | None = None
        if not is_linear:
            why = f"its module is of class {type(module).__name__}, not Linear"
        elif type(parameter) is not nn.Parameter or parameter.is_meta:
            why = "its weight is quantized, sharded or not loaded"
        elif "forward" in vars(module):
            why = "its forward is replaced already"
        elif users[_memory(parameter)] > 1:
            why = "another module uses its weight"
        yield owner if is_linear else path, module, why or reason(parameter.data)


def _memory(parameter: Tensor) -> int:
    return parameter.untyped_storage().data_ptr() if type(parameter) is nn.Parameter else id(parameter)


def _swap(module: nn.Linear, matrix: SparseMatrix) -> Callable[[], None]:
    """Free the dense weight of a layer and multiply by the sparse one; return what undoes it."""
    parameter = module.weight
    # Code that reads the weight without calling the layer computes NaN.
    parameter.data = placeholder(parameter.data, parameter.device)
    module.forward = partial(_forward, module, matrix)  # type: ignore[method-assign]
    handles = [
        module.register_state_dict_post_hook(partial(_restore_key, matrix)),
        module.register_load_state_dict_pre_hook(_refuse_load),
    ]

    def undo() -> None:
        del module.forward
        parameter.data = matrix.dense()
        for handle in handles:
            handle.remove()

    return undo


def _forward(module: nn.Linear, matrix: SparseMatrix, input: Tensor) -> Tensor:
    needs_gradient = torch.is_grad_enabled() and input.requires_grad
    if needs_gradient or torch.is_autocast_enabled(input.device.type) or not matrix.accepts(input):
        return F.linear(input, matrix.dense(), module.bias)
    return matrix.linear(input, module.bias)


def _restore_key(matrix: SparseMatrix, module: nn.Module, state: dict[str, Any], prefix: str, _: object) -> None:
    state[f"{prefix}weight"] = matrix.dense()


def _refuse_load(*_: object) -> None:
    raise ValueError(
        "load_state_dict needs dense weights to replace, but the model is accelerated. Call undo() of what the "
        "accelerate function returned, load, and accelerate again."
    )


def _call_all(undos: list[Callable[[], None]]) -> None:
    while undos:
        undos.pop()()


def _nothing() -> None:
    """Undo nothing."""
