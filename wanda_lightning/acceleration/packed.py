"""Multiply by packed weights on a CPU: one bit per weight, and the kept weights.

With few tokens, a product takes as long as reading the weights from memory, and at 60 % zeros a packed matrix has 0.46
(bfloat16) or 0.43 (float32) of the bytes. `kernel.cpp` is compiled when it is first used.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanda_lightning.acceleration.swap import Accelerated, accelerate
from wanda_lightning.core import bits

_DTYPES = (torch.float32, torch.bfloat16)
_LEAST_ZEROS = 0.4
_FEW_TOKENS = 4  # up to here the kernel multiplies; more tokens share one expanded copy of the weight
_LANES = 8  # the AVX2 code reads so many kept weights at once


def accelerate_cpu(model: nn.Module) -> Accelerated:
    """Run the pruned linear layers of a model from packed weights, which decodes faster and needs less memory.

    A call with many tokens expands each weight first, which makes it slower. The kernel is compiled on the first call
    of a process.

    Args:
        model: A model in float32 or bfloat16 on the CPU.

    Returns:
        The accelerated layers, and the reason for every other matrix.

    Raises:
        ImportError: If there is no C++ compiler, or the processor has no AVX2.
        ValueError: If no layer can be accelerated.
    """
    kernel()
    return accelerate(model, "accelerate_cpu", dense_reason, PackedMatrix)


def dense_reason(weight: Tensor) -> str | None:
    """Return why a packed matrix would not be faster, or None.

    Example:
        >>> dense_reason(torch.tensor([[0.0, 1.0], [1.0, 1.0]]))
        'fewer than 40% of its weights are zero'
    """
    if weight.device.type != "cpu":
        return f"it is on {weight.device.type}, not on the CPU"
    if weight.dtype not in _DTYPES:
        return f"its dtype is {str(weight.dtype).removeprefix('torch.')}, not float32 or bfloat16"
    if int(weight.count_nonzero()) > (1 - _LEAST_ZEROS) * weight.numel():
        return f"fewer than {_LEAST_ZEROS:.0%} of its weights are zero"
    return None


class PackedMatrix:
    """A matrix as one bit per weight and its weights that are not zero, row by row."""

    def __init__(self, weight: Tensor) -> None:
        self._rows, self._columns = weight.shape
        keep = weight != 0
        self._masks = _bits(F.pad(keep, (0, -self._columns % 64)))
        self._offsets = F.pad(keep.sum(1).cumsum(0), (1, 0))
        self._values = F.pad(weight[keep], (0, _LANES))
        self._negative_zeros = bits.pack(weight.signbit() & ~keep)  # no product needs them
        self._dtype = str(weight.dtype).removeprefix("torch.")

    @property
    def nbytes(self) -> int:
        """Number of bytes in memory."""
        return sum(t.nbytes for t in (self._masks, self._offsets, self._values, self._negative_zeros))

    def accepts(self, inputs: Tensor) -> bool:
        """Whether the inputs have the dtype of the weight, and its width."""
        is_here = inputs.device.type == "cpu" and type(inputs) in (Tensor, nn.Parameter)
        return is_here and inputs.dtype == self._values.dtype and inputs.shape[-1] == self._columns

    def linear(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        """Return `inputs @ weight.T + bias`."""
        tokens = inputs.numel() // self._columns
        fits = bias is None or (bias.dtype == inputs.dtype and bias.is_contiguous())
        if tokens > _FEW_TOKENS or not fits:
            return F.linear(inputs, self._expanded(), bias)
        padding = -self._columns % 64
        padded = F.pad(inputs, (0, padding)) if padding else inputs.contiguous()
        outputs = inputs.new_empty(*inputs.shape[:-1], self._rows)
        multiply = getattr(kernel(), f"multiply_{self._dtype}")
        multiply(
            *self._pointers(),
            padded.data_ptr(),
            None if bias is None else bias.data_ptr(),
            outputs.data_ptr(),
            self._rows,
            self._masks.shape[1],
            tokens,
            torch.get_num_threads(),
        )
        return outputs

    def dense(self) -> Tensor:
        """Return the weight as it was, bit for bit."""
        dense = self._expanded()
        if self._negative_zeros.numel():
            dense[bits.unpack(self._negative_zeros, dense.shape)] = -0.0
        return dense

    def _expanded(self) -> Tensor:
        dense = self._values.new_empty(self._rows, self._columns)
        expand = getattr(kernel(), f"expand_{self._dtype}")
        expand(*self._pointers(), dense.data_ptr(), self._rows, self._columns, torch.get_num_threads())
        return dense

    def _pointers(self) -> tuple[int, int, int]:
        return self._masks.data_ptr(), self._values.data_ptr(), self._offsets.data_ptr()


def _bits(keep: Tensor) -> Tensor:
    """Return int64 masks, with the first column in the lowest bit; the width must be a multiple of 64."""
    octets = keep.view(torch.uint8).unflatten(1, (-1, 8))
    packed = torch.zeros_like(octets[..., 0])
    for bit in range(8):
        packed |= octets[..., bit] << bit
    return packed.view(torch.int64)


@cache
def kernel() -> ctypes.CDLL:
    """Compile the kernel for this processor and load it.

    Raises:
        ImportError: If there is no compiler, or it cannot compile the kernel for this processor.
    """
    return compile_kernel("native")


def compile_kernel(processor: str) -> ctypes.CDLL:
    """Compile the kernel for a processor, given as the compiler's `-march`, and load it; errors as for `kernel`."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise ImportError("accelerate_cpu needs a C++ compiler, but neither g++ nor c++ is in PATH. Install one.")
    with TemporaryDirectory() as folder:
        library = Path(folder) / "kernel.so"
        flags = ["-std=c++17", "-O3", f"-march={processor}", "-fopenmp", "-shared", "-fPIC"]  # OpenMP is torch's own
        source = Path(__file__).with_name("kernel.cpp")
        done = subprocess.run([compiler, *flags, source, "-o", library], capture_output=True, text=True, check=False)
        if done.returncode:
            error = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr)
            raise ImportError(
                "accelerate_cpu needs a C++ compiler with OpenMP and a processor with AVX2, but "
                f"{compiler} says: {' '.join(error.split())}"
            )
        loaded = ctypes.CDLL(str(library))
    pointer, number = ctypes.c_void_p, ctypes.c_long
    for name in ("float32", "bfloat16"):
        multiply, expand = getattr(loaded, f"multiply_{name}"), getattr(loaded, f"expand_{name}")
        multiply.argtypes = [pointer] * 6 + [number] * 3 + [ctypes.c_int]
        expand.argtypes = [pointer] * 4 + [number] * 2 + [ctypes.c_int]
        multiply.restype = expand.restype = None
    return loaded
