"""Run 2:4 layers on sparse tensor cores."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanda_lightning.acceleration.swap import Accelerated, accelerate

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
    refuse_devices({parameter.device for parameter in model.parameters()})
    return accelerate(model, "accelerate_2to4", dense_reason, SemiStructured)


def refuse_devices(devices: set[torch.device]) -> None:
    """Raise a ValueError for a device without sparse tensor cores."""
    needs = "accelerate_2to4 needs a model on a CUDA device of compute capability 8.0 or later"
    if others := sorted({device.type for device in devices} - {"cuda"}):
        raise ValueError(f"{needs}, but its weights are on {' and '.join(others)}. Use model.cuda() on such a machine.")
    for device in devices:
        if (capability := torch.cuda.get_device_capability(device)) < (8, 0):
            raise ValueError(
                f"{needs}, but {device} has {capability[0]}.{capability[1]}: it has no sparse tensor cores."
            )


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


class SemiStructured:
    """A 2:4 matrix on a CUDA device, with its dense form on the host: compression loses the sign of zeros."""

    def __init__(self, weight: Tensor) -> None:
        self._host, self._device = weight.cpu(), weight.device
        weight = weight.masked_fill(weight == 0, 0)  # compression could take -0.0 for a kept weight
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*SparseSemiStructuredTensor is in prototype", UserWarning)
            if torch.backends.cusparselt.is_available():
                sparse: Any = torch.sparse.to_sparse_semi_structured(weight)
            else:
                sparse = torch.sparse.SparseSemiStructuredTensorCUTLASS.from_dense(weight)
        self._sparse = sparse

    @property
    def nbytes(self) -> int:
        """Number of bytes on the device."""
        return sum(getattr(self._sparse, name).nbytes for name in self._sparse.__tensor_flatten__()[0])

    def accepts(self, inputs: Tensor) -> bool:
        """Whether the inputs have the dtype and the device of the weight."""
        return inputs.dtype == self._sparse.dtype and inputs.device == self._device

    def linear(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        """Return `inputs @ weight.T + bias`."""
        with torch.no_grad():
            return F.linear(inputs, self._sparse, bias)

    def dense(self) -> Tensor:
        """Copy the weight back to the device."""
        return self._host.to(self._device, copy=True)
