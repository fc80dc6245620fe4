"""A linear layer with LoRA adapters that never change its zeros."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from wanda_lightning.common.errors import UserError
from wanda_lightning.common.float64 import wide_dtype
from wanda_lightning.models.quantized import is_quantized, read_weight


def _as_factors(weight: Tensor) -> Tensor:
    """Return 1 where a weight is not zero, and 0 where it is, in float32 or wider."""
    return (weight != 0).to(wide_dtype(weight))


def _kept_sum(
    weight: Tensor, left: Tensor, right: Tensor, keep: Tensor, only_delta: bool
) -> Tensor:
    """Return W + (left @ right) * keep, or without W if `only_delta`, in the dtype of `keep` = (W != 0)."""
    dtype = keep.dtype
    left = left.to(dtype)
    right = right.to(dtype)
    total = torch.mm(left, right) if only_delta else torch.addmm(weight.to(dtype), left, right)
    return total.mul_(keep)


class _KeptProduct(torch.autograd.Function):
    """Compute x @ (W + (left @ right) * keep)^T + addend, or the same without W if `only_delta`.

    x is (..., d_in) in the dtype of the product. W, which gets no gradient, and left @ right are (d_out, d_in), or
    (d_in, d_out) if `transposed`. `addend` is None, a bias (d_out,) or an output (..., d_out). Only x, W and the two
    factors are saved for backward: no second matrix of the size of W. A quantized W is a function that dequantizes it,
    in both passes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | Callable[[], Tensor],
        left: Tensor,
        right: Tensor,
        addend: Tensor | None,
        transposed: bool,
        only_delta: bool,
    ) -> Tensor:
        if isinstance(weight, Tensor):
            ctx.dequantize = None
            ctx.save_for_backward(x, weight, left, right)
        else:
            ctx.dequantize = weight
            ctx.save_for_backward(x, None, left, right)
            weight = weight()
        ctx.transposed = transposed
        ctx.only_delta = only_delta
        ctx.is_bias = addend is not None and addend.dim() == 1

        # float32: a sum in half precision would lose small updates, also under autocast.
        with torch.autocast(x.device.type, enabled=False):
            keep = _as_factors(weight)
            matrix = _kept_sum(weight, left, right, keep, only_delta).to(x.dtype)
            if not transposed:
                matrix = matrix.t()
            d_in, d_out = matrix.shape
            rows = x.reshape(-1, d_in)
            if addend is None:
                product = torch.mm(rows, matrix)
            elif ctx.is_bias:
                product = torch.addmm(addend, rows, matrix)
            else:
                product = torch.addmm(addend.reshape(-1, d_out), rows, matrix)
            return product.view(*x.shape[:-1], d_out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, left, right = ctx.saved_tensors
        if ctx.dequantize:
            weight = ctx.dequantize()
        needs_x, _, needs_left, needs_right, needs_addend, *_ = ctx.needs_input_grad
        grad_x = grad_left = grad_right = grad_addend = None
        with torch.autocast(x.device.type, enabled=False):
            rows = x.reshape(-1, x.shape[-1])
            grads = grad.reshape(-1, grad.shape[-1])
            keep = _as_factors(weight)
            if needs_x:
                matrix = _kept_sum(weight, left, right, keep, ctx.only_delta).to(grads.dtype)
                if ctx.transposed:
                    matrix = matrix.t()
                grad_x = torch.mm(grads, matrix).view(x.shape)
            if needs_left or needs_right:
                # The gradient of W as a dense matrix; the factors get it where W is not zero.
                dense = torch.mm(rows.t(), grads) if ctx.transposed else torch.mm(grads.t(), rows)
                dense.mul_(keep)
                # Autograd casts these, and ignores one that is not needed.
                grad_left = torch.mm(dense, right.to(dense.dtype).t())
                grad_right = torch.mm(left.to(dense.dtype).t(), dense)
            if needs_addend:
                grad_addend = grads.sum(0) if ctx.is_bias else grad
        return grad_x, None, grad_left, grad_right, grad_addend, None, None


class KeepZerosLinear(LoraLinear):  # type: ignore[misc]  # PEFT is not followed by mypy
    """A linear layer with adapters that never change its zeros. `get_peft_model` replaces each target with one.

    The updates of active adapters add up. While adapters are merged, the layer keeps the original weight in memory (not
    in the state dict), since subtracting the update from the rounded sum could turn a small weight into a zero.
    """

    weight_before_merge: Tensor | None = None  # while adapters are merged
    merged_adapters: list[str]
    dequantizes = False  # whether the base layer is quantized; torch.compile cannot trace how it is recognized

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map (..., d_in) to (..., d_out)."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(x, *args, **kwargs)
        names = [name for name in self.active_adapters if name in self.lora_A]
        if names and not args and not kwargs and self._fuses(names):
            result = self._fused(x, names)
        else:
            result = self.base_layer(x, *args, **kwargs)
            for name in names:
                adapter_input = self.lora_dropout[name](x).to(result.dtype)
                result = self._product(adapter_input, [name], result, only_delta=True)
        return result

    def _fuses(self, names: Sequence[str]) -> bool:
        """Whether one product may replace the layer's: no dropout, no hooks, a frozen weight of at least 32 bits."""
        base = self.base_layer
        # torch has no public way to ask for hooks, which only `base(x)` calls.
        hooks = (value for name, value in vars(base).items() if name.endswith("hooks"))
        if any(hooks) or "forward" in vars(base):
            return False
        if type(base).forward not in (nn.Linear.forward, Conv1D.forward):
            return False
        # Without dropout, PEFT inserts an identity.
        dropouts = [self.lora_dropout[name] for name in names]
        if any(drop.training and not isinstance(drop, nn.Identity) for drop in dropouts):
            return False
        weight = base.weight
        is_frozen = not (self.dequantizes or weight.requires_grad)
        return is_frozen and weight.dtype in (torch.float32, torch.float64)

    def _fused(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """Return the output of the layer with its adapters as one product."""
        base = self.get_base_layer()
        dtype = base.weight.dtype
        device = x.device.type
        if torch.is_autocast_enabled(device) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
            x = x.to(dtype)
        bias = None if base.bias is None else base.bias.to(dtype)
        return self._product(x, names, bias, only_delta=False)

    def _product(
        self, x: Tensor, names: Sequence[str], addend: Tensor | None, *, only_delta: bool
    ) -> Tensor:
        # Two matrices of low rank whose product is the sum of s B A, in the layout of the layer.
        up = torch.cat([self.scaling[name] * self.lora_B[name].weight for name in names], dim=1)
        down = torch.cat([self.lora_A[name].weight for name in names], dim=0)
        transposed = self.fan_in_fan_out
        factors = [down.t(), up.t()] if transposed else [up, down]

        base = self.get_base_layer()
        weight = partial(read_weight, base) if self.dequantizes else base.weight
        return _KeptProduct.apply(x, weight, *factors, addend, transposed, only_delta)  # type: ignore[no-untyped-call]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return s (B A) * keep of one adapter, in the layout of the layer."""
        delta = super().get_delta_weight(adapter)
        weight = self.weight_before_merge
        if weight is None:
            weight = read_weight(self.get_base_layer())
        return delta.masked_fill_((weight == 0).to(delta.device), 0)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Replace W with W + s (B A) * keep, as PEFT does, and keep the original weight for `unmerge`."""
        base = self.get_base_layer()
        if is_quantized(base):
            raise UserError(
                f"The adapters of a {type(base).__name__} with quantized weights cannot be merged in place. Use "
                "wanda_lightning.lora.merge(model), which dequantizes the model."
            )
        if self.weight_before_merge is None:
            self.weight_before_merge = base.weight.data.clone()
        try:
            super().merge(safe_merge, adapter_names)
        finally:
            if not self.merged:  # nothing was to be merged, or the first adapter failed
                self.weight_before_merge = None

    def unmerge(self) -> None:
        """Restore the original weight, bit for bit."""
        if self.weight_before_merge is None:
            return
        base = self.get_base_layer()
        base.weight.data = self.weight_before_merge.to(base.weight)
        self.merged_adapters = []
        self.weight_before_merge = None

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return False: a masked product has no low rank, and a plain LoRA would fill the zeros."""
        return False
