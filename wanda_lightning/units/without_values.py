"""Build modules on the meta device without initializing their weights, which have no values there.

PyTorch computes the shapes of such operations in Python: timm's truncated normal distributions took three quarters of
the time to build a ConvNeXt or a ViT, and the search for arguments builds a hundred of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

_FILLS = frozenset(
    {
        Tensor.add_,
        Tensor.clamp_,
        Tensor.erfinv_,
        Tensor.fill_,
        Tensor.mul_,
        Tensor.normal_,
        Tensor.uniform_,
        Tensor.zero_,
    }
)


class WithoutValues(TorchFunctionMode):
    """Leave out operations that only change the values of a tensor on the meta device."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Return the tensor as it is, or call the function. Models compute some numbers on the CPU meanwhile."""
        if func in _FILLS and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))
