"""Run 2:4 layers on sparse tensor cores, with PyTorch's own semi-structured tensors."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from wanda_lightning.common.errors import UserError
from wanda_lightning.core.placeholders import placeholder
from wanda_lightning.models.refuse_model import refuse_no_module

_DTYPES = (torch.float16, torch.bfloat16)
_ROWS, _COLUMNS = 32, 64  # CUTLASS requires multiples of these, cuSPARSELt multiples of 16


def accelerate_2to4(model: nn.Module) -> Accelerated:
    """Run the 2:4 layers of a model with PyTorch's semi-structured sparsity.

    The dense weights move to the host, from where the state dict and `undo()` read them.

    Args:
        model: A model in float16 or bfloat16 on a CUDA device of compute capability 8.0 (Ampere) or later.

    Returns:
        The accelerated layers, and the reason for every other matrix.

    Raises:
        ValueError: If the model is elsewhere, the device is older, or no layer can be accelerated.
    """
    refuse_no_module(model, "accelerate_2to4(model)")
    refuse_devices({parameter.device for parameter in model.parameters()})
    linears, dense = {}, {}
    for name, module, reason in _matrices(model):
        if reason is None:
            linears[name] = module
        else:
            dense[name] = reason
    if not linears:
        counts = Counter(dense.values()).most_common()
        found = "; ".join(f"{why} ({count})" for why, count in counts) or "the model has no matrix"
        raise UserError(
            f"accelerate_2to4 needs at least one layer that it can accelerate, but all stay dense: {found}."
        )
    accelerated = Accelerated({}, dense)
    try:
        for name, module in linears.items():
            accelerated.layers[name] = SparseWeight(module)
    except BaseException:
        accelerated.undo()
        raise
    return accelerated


class Accelerated(AbstractContextManager["Accelerated"]):
    """A model whose 2:4 layers run from sparse weights until `undo()` or the end of a `with` block.

    The model is for inference meanwhile. Its state dict stays as it was, but nothing can be loaded into it.

    Attributes:
        layers: The layers that are accelerated, with their sparse weights.
        dense: The other matrices, with the reason why each stays dense.
    """

    def __init__(self, layers: dict[str, SparseWeight], dense: dict[str, str]) -> None:
        self.layers, self.dense = layers, dense

    @property
    def nbytes(self) -> int:
        """Number of bytes of the sparse weights on the device."""
        return sum(weight.nbytes for weight in self.layers.values())

    def undo(self) -> None:
        """Restore the dense weights, bit for bit, in the same parameters."""
        for weight in self.layers.values():
            weight.undo()
        self.layers = {}

    def __exit__(self, *_: object) -> None:
        """Restore the dense weights."""
        self.undo()

    def __repr__(self) -> str:
        return f"Accelerated({len(self.layers)} layers; {len(self.dense)} matrices stay dense)"


def refuse_devices(devices: set[torch.device]) -> None:
    """Raise a ValueError for a device without sparse tensor cores."""
    needs = "accelerate_2to4 needs a model on a CUDA device of compute capability 8.0 or later"
    if others := sorted({device.type for device in devices} - {"cuda"}):
        raise UserError(f"{needs}, but its weights are on {' and '.join(others)}. Use model.cuda() on such a machine.")
    for device in devices:
        if (capability := torch.cuda.get_device_capability(device)) < (8, 0):
            raise UserError(
                f"{needs}, but {device} has {capability[0]}.{capability[1]}: it has no sparse tensor cores."
            )


def _matrices(model: nn.Module) -> Iterator[tuple[str, Any, str | None]]:
    """Yield the name of each matrix, its module, and why it stays dense."""
    named = dict(model.named_parameters(remove_duplicate=False))
    users = Counter(_memory(parameter) for parameter in named.values())
    for path, parameter in named.items():
        owner, _, attribute = path.rpartition(".")
        module = model.get_submodule(owner)
        if parameter.dim() < 2:
            continue
        is_linear = type(module) is nn.Linear and attribute == "weight"
        if not is_linear:
            reason: str | None = f"its module is of class {type(module).__name__}, not Linear"
        elif type(parameter) is not nn.Parameter or parameter.is_meta:
            reason = "its weight is quantized, sharded or not loaded"
        elif "forward" in vars(module):
            reason = "its forward is replaced already"
        elif users[_memory(parameter)] > 1:
            reason = "another module uses its weight"
        else:
            reason = dense_reason(parameter.data)
        yield owner if is_linear else path, module, reason


def _memory(parameter: Tensor) -> int:
    return parameter.untyped_storage().data_ptr() if type(parameter) is nn.Parameter else id(parameter)


def dense_reason(weight: Tensor) -> str | None:
    """Return why a matrix cannot run on sparse tensor cores, or None if it can.

    Example:
        >>> dense_reason(torch.tensor([[1.0, 0, 0, 2]] * 32).repeat(1, 16).half()) is None
        True
        >>> dense_reason(torch.ones(32, 64).half())
        'its zeros are not 2:4'
    """
    rows, columns = weight.shape
    if weight.dtype not in _DTYPES:
        return f"its dtype is {str(weight.dtype).removeprefix('torch.')}, not float16 or bfloat16"
    if rows % _ROWS or columns % _COLUMNS:
        return f"its {rows} rows must be a multiple of {_ROWS} and its {columns} columns a multiple of {_COLUMNS}"
    if bool(((weight.reshape(-1, 4) != 0).sum(1) > 2).any()):
        return "its zeros are not 2:4"
    return None


def compressed(weight: Tensor) -> Any:
    """Return a 2:4 matrix as PyTorch's semi-structured tensor."""
    weight = weight.masked_fill(weight == 0, 0)  # compression could take -0.0 for a kept weight
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*SparseSemiStructuredTensor is in prototype", UserWarning)
        if torch.backends.cusparselt.is_available():
            return torch.sparse.to_sparse_semi_structured(weight)
        return torch.sparse.SparseSemiStructuredTensorCUTLASS.from_dense(weight)


class SparseWeight:
    """The 2:4 weight of a linear layer, which the layer multiplies by until `undo`.

    The dense weight is on the host meanwhile, since the sparse one has no signs of zeros. The state dict has the dense
    weight, and code that reads the parameter without calling the layer computes NaN.
    """

    def __init__(self, module: nn.Linear) -> None:
        weight = module.weight.data
        self._module, self._host, self._device = module, weight.cpu(), weight.device
        self._sparse = compressed(weight)
        module.weight.data = placeholder(module.weight.data, self._device)
        module.forward = self._forward  # type: ignore[method-assign]
        self._handles: list[RemovableHandle] = [
            module.register_state_dict_post_hook(partial(_restore_key, self)),
            module.register_load_state_dict_pre_hook(_refuse_load),
        ]

    @property
    def nbytes(self) -> int:
        """Number of bytes on the device."""
        return sum(getattr(self._sparse, name).nbytes for name in self._sparse.__tensor_flatten__()[0])

    def dense(self) -> Tensor:
        """Copy the dense weight back to the device."""
        return self._host.to(self._device, copy=True)

    def undo(self) -> None:
        """Restore the dense weight and the forward of the layer."""
        del self._module.forward
        self._module.weight.data = self.dense()
        for handle in self._handles:
            handle.remove()

    def _forward(self, input: Tensor) -> Tensor:
        needs_gradient = torch.is_grad_enabled() and input.requires_grad
        fits = input.dtype == self._sparse.dtype and input.device == self._device
        if needs_gradient or torch.is_autocast_enabled(input.device.type) or not fits:
            return F.linear(input, self.dense(), self._module.bias)
        with torch.no_grad():
            return F.linear(input, self._sparse, self._module.bias)


def _restore_key(weight: SparseWeight, module: nn.Module, state: dict[str, Any], prefix: str, _: object) -> None:
    state[f"{prefix}weight"] = weight.dense()


def _refuse_load(*_: object) -> None:
    raise UserError(
        "load_state_dict needs dense weights to replace, but the model is accelerated. Call undo() of what "
        "accelerate_2to4 returned, load, and accelerate again."
    )
