"""LoRA that merges into a pruned model without filling its zeros, as one more adapter of PEFT.

Plain LoRA (Hu et al. 2021) merges to W + s B A, which is dense. Sun et al. 2024 therefore keep the adapters of a pruned
model apart. The adapters here are trained as what they merge to, `W + s (B A) * keep` with `keep = (W != 0)`: the zeros
of the frozen weight are the mask, nothing else is stored.

    model = get_peft_model(pruned, KeepZerosLoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    ...  # train, save_pretrained, PeftModel.from_pretrained, set_adapter: as with any adapter of PEFT
    sparse = merge(model)

Importing this module registers the kind of adapter with PEFT. A process that loads a saved one has to import it too;
without, PEFT stops with `KeyError: 'WANDA_LIGHTNING_KEEP_ZEROS_LORA'` and does not take it for a plain LoRA.
"""

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, LoraModel, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_adapters_to_merge,
)
from peft.utils import PeftType
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

__all__ = ["KeepZerosLinear", "KeepZerosLoraConfig", "KeepZerosLoraModel", "merge"]

KEEP_ZEROS_LORA = "WANDA_LIGHTNING_KEEP_ZEROS_LORA"  # in adapter_config.json, and in the error of who cannot load it
INITS = (True, False, "gaussian", "orthogonal")  # all others write to the base weight, or need passes of their own
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
QUANTIZED_ATTRIBUTES = ("qweight", "qzeros", "W_q", "codebooks", "quant_state", "is_quantized")


def _peft_type(name: str) -> Any:
    """The member of PEFT's enumeration with this name, added if it is not there: PEFT has no door for foreign ones."""
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_ = member._value_ = name
        PeftType._member_names_.append(name)
        PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
        type.__setattr__(PeftType, name, member)  # Enum's own __setattr__ refuses members
    return PeftType(name)


@dataclasses.dataclass
class KeepZerosLoraConfig(LoraConfig):  # type: ignore[misc]  # PEFT is not followed by mypy
    """LoRA of which the merged weight keeps every zero: W + s (B A) * keep, keep = (W != 0).

    W is (d_out, d_in), A (r, d_in), B (d_out, r), s = lora_alpha / r (over sqrt(r) with `use_rslora`). Use it like
    `peft.LoraConfig`, with `peft.get_peft_model`, on a model that is pruned already; the options are those of LoRA, for
    nn.Linear and transformers' Conv1D. Dropout is, as in LoRA, on what enters the adapter.

    A weight in half precision does not resolve small updates: W + s (B A) * keep would be W until an update exceeds
    half its last digit. There the base and the adapter are two products while adapted, and only merging rounds their
    sum, once: merged and adapted then differ by that rounding (bfloat16: 2^-9 relative for each weight). With W in
    float32 and no active dropout it is one product, and the merged model equals the adapted one.

    Source: Hu et al. 2021 (LoRA), eq. 3; Sun et al. 2024 fine-tune with LoRA and keep the adapters apart.

    Raises:
        ValueError: an option of LoRA that cannot keep zeros (DoRA and the other variants, initialisations that write
            to the base weight, `target_parameters`, `layer_replication`, Megatron); with `get_peft_model`: a target
            that is no linear layer, is quantised, or shares its weight with another target.

    Warns:
        UserWarning: with `get_peft_model`: no targeted weight holds a zero, so the adapters are plain LoRA.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = _peft_type(KEEP_ZEROS_LORA)
        refused = [f.name for f in dataclasses.fields(self) if f.metadata.get("is_lora_variant")]
        refused += ["use_qalora", "target_parameters", "layer_replication", "megatron_config"]
        if used := [name for name in refused if getattr(self, name, None)]:
            raise ValueError(
                f"KeepZerosLoraConfig trains W + s (B A) * keep and has no {', '.join(used)}. "
                "Leave it out, or use peft.LoraConfig, whose merged weights are dense."
            )
        if self.init_lora_weights not in INITS:
            raise ValueError(
                f"KeepZerosLoraConfig does not take init_lora_weights={self.init_lora_weights!r}, which may "
                f"write to the base weight and its zeros. Use one of {', '.join(map(repr, INITS))}."
            )


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _kept_sum(weight: Tensor, left: Tensor, right: Tensor, keep: Tensor, *, only_delta: bool = False) -> Tensor:
    """(W + left @ right) * keep, which is W + (left @ right) * keep, or without W; never in less than float32."""
    dtype = keep.dtype
    left, right = left.to(dtype), right.to(dtype)
    total = torch.mm(left, right) if only_delta else torch.addmm(weight.to(dtype), left, right)
    return total.mul_(keep)


class _KeptProduct(torch.autograd.Function):
    """x @ (W + (left @ right) * keep)^T + addend, or without W; keeps x and the factors for backward, nothing dense.

    x is (..., d_in) in the dtype of the product. W, left @ right and keep have the layout of the layer: (d_out, d_in),
    or (d_in, d_out) if `transposed`. `addend` is None, a bias (d_out,) or an output (..., d_out).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        left: Tensor,
        right: Tensor,
        addend: Tensor | None,
        transposed: bool,
        only_delta: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, left, right)
        ctx.transposed, ctx.only_delta = transposed, only_delta
        ctx.bias = addend is not None and addend.dim() == 1
        with _without_autocast(x.device):
            keep = (weight != 0).to(torch.promote_types(weight.dtype, torch.float32))
            matrix = _kept_sum(weight, left, right, keep, only_delta=only_delta).to(x.dtype)
            matrix = matrix if transposed else matrix.t()
            rows, shape = x.reshape(-1, x.shape[-1]), (*x.shape[:-1], matrix.shape[1])
            if addend is None:
                return torch.mm(rows, matrix).view(shape)
            return torch.addmm(addend if ctx.bias else addend.reshape(-1, shape[-1]), rows, matrix).view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, left, right = ctx.saved_tensors
        needs_x, needs_weight, needs_left, needs_right, needs_addend, *_ = ctx.needs_input_grad
        grad_x = grad_weight = grad_left = grad_right = grad_addend = None
        with _without_autocast(x.device):
            rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
            keep = (weight != 0).to(torch.promote_types(weight.dtype, torch.float32))
            if needs_x:
                matrix = _kept_sum(weight, left, right, keep, only_delta=ctx.only_delta).to(grads.dtype)
                grad_x = torch.mm(grads, matrix.t() if ctx.transposed else matrix).view(x.shape)
            if needs_weight or needs_left or needs_right:
                dense = torch.mm(rows.t(), grads) if ctx.transposed else torch.mm(grads.t(), rows)
                if needs_weight and not ctx.only_delta:
                    grad_weight = dense.to(weight.dtype, copy=True)
                dense.mul_(keep.to(dense.dtype))
                if needs_left:
                    grad_left = torch.mm(dense, right.to(dense.dtype).t()).to(left.dtype)
                if needs_right:
                    grad_right = torch.mm(left.to(dense.dtype).t(), dense).to(right.dtype)
            if needs_addend:
                grad_addend = grads.sum(0) if ctx.bias else grad
        return grad_x, grad_weight, grad_left, grad_right, grad_addend, None, None


class KeepZerosLinear(LoraLinear):  # type: ignore[misc]  # PEFT is not followed by mypy
    """A linear layer with adapters that leave its zeros alone; what `get_peft_model` puts in for each target.

    `base_layer` holds W, (d_out, d_in) in nn.Linear and (d_in, d_out) in Conv1D. Several active adapters add up.
    While merged, the weight from before is kept in memory (not in the state dict): a sum that was rounded cannot be
    taken apart again, and a kept weight that it swallows would become a zero.
    """

    before_merge: tuple[Tensor, Tensor | None] | None = None  # weight and bias, while merged
    merged_adapters: list[str]
    delta_keeps_zeros = True

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., d_in) to (..., d_out); `adapter_names`, one for each sample, is PEFT's mixed batch."""
        self._check_forward_args(x, *args, **kwargs)
        adapter_names = kwargs.pop("adapter_names", None)
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is None:
            return self._adapted(x, self.active_adapters, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        for name in set(adapter_names) & set(self.lora_A):
            rows = [row for row, other in enumerate(adapter_names) if other == name]
            result[rows] = self._adapted(x[rows], [name], *args, **kwargs)
        return result

    def _adapted(self, x: Tensor, names: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        names = [name for name in names if name in self.lora_A]
        noisy = [
            name for name in names if self.lora_dropout[name].training and getattr(self.lora_dropout[name], "p", 0)
        ]
        steady = [name for name in names if name not in noisy]
        if steady and not args and not kwargs and self._fuses():
            base = self.get_base_layer()
            autocast = torch.is_autocast_enabled(x.device.type) and base.weight.dtype != torch.float64
            dtype = torch.get_autocast_dtype(x.device.type) if autocast else base.weight.dtype
            x = x.to(dtype) if autocast else x
            result = self._product(x, steady, None if base.bias is None else base.bias.to(dtype), only_delta=False)
        else:
            result = self.base_layer(x, *args, **kwargs)
            if steady:
                result = self._product(x.to(result.dtype), steady, result, only_delta=True)
        for name in noisy:
            result = self._product(self.lora_dropout[name](x).to(result.dtype), [name], result, only_delta=True)
        for name in names:
            if self.lora_bias[name]:
                result = result + (self.scaling[name] * self.lora_B[name].bias).to(result.dtype)
        return result

    def _product(self, x: Tensor, names: Sequence[str], addend: Tensor | None, *, only_delta: bool) -> Tensor:
        left, right = self._factors(names)
        weight = self.get_base_layer().weight
        product: Callable[..., Tensor] = _KeptProduct.apply
        return product(x, weight, left, right, addend, self.fan_in_fan_out, only_delta)

    def _factors(self, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Two thin matrices whose product is the sum of s B A over the adapters, in the layout of the layer."""
        outs = [self.scaling[name] * self.lora_B[name].weight for name in names]
        ins = [self.lora_A[name].weight for name in names]
        b, a = (outs[0], ins[0]) if len(names) == 1 else (torch.cat(outs, 1), torch.cat(ins, 0))
        return (a.t(), b.t()) if self.fan_in_fan_out else (b, a)

    def _fuses(self) -> bool:
        """Whether one product may stand for the layer's own forward: no hooks, and W resolves small updates."""
        base = self.base_layer
        hooks = (base._forward_hooks, base._forward_pre_hooks, base._backward_hooks, base._backward_pre_hooks)
        plain = type(base).forward in (nn.Linear.forward, Conv1D.forward) and "forward" not in vars(base)
        return plain and not any(hooks) and base.weight.dtype in (torch.float32, torch.float64)

    def _unmerged_weight(self) -> Tensor:
        return self.get_base_layer().weight.data if self.before_merge is None else self.before_merge[0]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """S (B A) * keep of one adapter, in the layout of the layer."""
        delta = super().get_delta_weight(adapter)
        return delta * (self._unmerged_weight() != 0).to(delta.device) if self.delta_keeps_zeros else delta

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put W + s (B A) * keep in the place of W, for the active or the named adapters.

        Raises:
            ValueError: with `safe_merge`, if the merged weight would not be finite; nothing is merged then.
            RuntimeError: an adapter has a bias and the layer has none.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        base = self.get_base_layer()
        names = [*self.merged_adapters, *names]  # from the weight before: rounded once, whatever the order
        weight, bias = self.before_merge or (base.weight.data, None if base.bias is None else base.bias.data)
        keep = weight != 0
        wide = torch.promote_types(weight.dtype, torch.float32)
        merged = torch.where(keep, _kept_sum(weight, *self._factors(names), keep.to(wide)).to(weight.dtype), weight)
        shifts = [self.scaling[name] * self.lora_B[name].bias for name in names if self.lora_bias[name]]
        if shifts and bias is None:
            raise RuntimeError("The adapter has a bias (lora_bias=True) and the layer has none: it cannot be merged.")
        merged_bias = (bias + sum(shifts)).to(bias.dtype) if shifts and bias is not None else bias
        if safe_merge and not all(tensor is None or torch.isfinite(tensor).all() for tensor in (merged, merged_bias)):
            raise ValueError(f"NaNs or infinities in the merged weights. The adapters {names} seem to be broken.")
        base.weight.data = merged
        if shifts:
            base.bias.data = merged_bias
        self.before_merge = weight, bias
        self.merged_adapters = names

    def unmerge(self) -> None:
        """Put the weight from before back, bit by bit."""
        if self.before_merge is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base = self.get_base_layer()
        (weight, bias), self.before_merge, self.merged_adapters = self.before_merge, None, []
        base.weight.data = weight.to(base.weight)
        if bias is not None:
            base.bias.data = bias.to(base.bias)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """No: what a masked product adds has no low rank, and a plain LoRA would fill the zeros."""
        return False


class KeepZerosLoraModel(LoraModel):  # type: ignore[misc]  # PEFT is not followed by mypy
    """PEFT's LoRA with `KeepZerosLinear` for each target; made by `get_peft_model` from a `KeepZerosLoraConfig`."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter; warn if there is no zero that it could keep."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        layers = (layer for layer in model.modules() if isinstance(layer, KeepZerosLinear))
        weights = [layer._unmerged_weight() for layer in layers if adapter_name in layer.lora_A]
        if weights and not any(weight.is_meta or bool((weight == 0).any()) for weight in weights):
            warnings.warn(
                f"None of the {len(weights)} layers that adapter {adapter_name!r} targets holds a zero, so it is a "
                "plain LoRA at a higher cost. Prune first, or use peft.LoraConfig.",
                stacklevel=2,
            )

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Look at all targets before the first is replaced."""
        super()._prepare_model(peft_config, model)
        config = _maybe_include_all_linear_layers(copy.copy(peft_config), model)
        adapted = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
        weights: dict[int, str] = {}
        for name, module in model.named_modules():
            if name and not name.startswith(adapted) and self._check_target_module_exists(config, name):
                weight = _check_target(name, module)
                if (other := weights.setdefault(id(weight), name)) != name:
                    raise ValueError(
                        f"{other} and {name} share one weight, which cannot take two adapters when they are merged. "
                        f"Target one of them, for example with exclude_modules=['{name}']."
                    )

    def _create_and_replace(
        self, lora_config: Any, adapter_name: str, target: nn.Module, *args: Any, current_key: str, **kwargs: Any
    ) -> None:
        _check_target(current_key, target)
        super()._create_and_replace(lora_config, adapter_name, target, *args, current_key=current_key, **kwargs)

    @staticmethod
    def _create_new_module(lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        if getattr(target, "_hf_tp_plan", None) is not None:
            raise ValueError(
                f"{kwargs['target_name']} is split over processes by tensor parallelism, where keep-zeros adapters are "
                "not implemented. Load the model without tp_plan."
            )
        kwargs.pop("parameter_name", None)
        transposed = isinstance(target, Conv1D)
        layer = KeepZerosLinear(target, adapter_name, config=lora_config, is_target_conv_1d_layer=transposed, **kwargs)
        layer.fan_in_fan_out = transposed  # the layer knows, whatever the config says
        return layer

    def _svd_generalized_task_arithmetic_weighted_adapter(
        self, combination_type: str, adapters: Any, weights: Any, new_rank: int, target: Any, *args: Any, **kwargs: Any
    ) -> Any:
        # The products before masking have a low rank, those after have not; the new adapter is masked again in use.
        target.delta_keeps_zeros = False
        try:
            return super()._svd_generalized_task_arithmetic_weighted_adapter(
                combination_type, adapters, weights, new_rank, target, *args, **kwargs
            )
        finally:
            del target.delta_keeps_zeros


_KIND = _peft_type(KEEP_ZEROS_LORA)
PEFT_TYPE_TO_CONFIG_MAPPING[_KIND] = KeepZerosLoraConfig
PEFT_TYPE_TO_TUNER_MAPPING[_KIND] = KeepZerosLoraModel
PEFT_TYPE_TO_PREFIX_MAPPING[_KIND] = LoraModel.prefix


def _is_quantized(layer: nn.Module) -> bool:
    """Whether the weight is codes rather than numbers: bitsandbytes, GPTQ, AWQ, HQQ, AQLM, torchao, float8, ..."""
    weight = getattr(layer, "weight", None)
    if isinstance(weight, Tensor) and isinstance(layer, nn.Linear | Conv1D | nn.Embedding):
        return weight.dtype not in FLOATS or not (type(weight) in (nn.Parameter, Tensor) or isinstance(weight, DTensor))
    return any(hasattr(layer, name) for name in QUANTIZED_ATTRIBUTES) or "quant" in type(layer).__qualname__.lower()


def _refuse_quantized(name: str, layer: nn.Module) -> None:
    if _is_quantized(layer):
        weight = getattr(layer, "weight", None)
        kind = f"{type(weight).__name__} of {weight.dtype}" if isinstance(weight, Tensor) else "quantised"
        raise ValueError(
            f"{name} is a quantised layer ({type(layer).__name__}, {kind}): merge into quantised weights would lose "
            "zeros: load the model unquantised."
        )


def _check_target(name: str, module: nn.Module) -> Tensor:
    """The weight of a layer that can take a keep-zeros adapter."""
    if isinstance(module, BaseTunerLayer) and not isinstance(module, KeepZerosLinear):
        raise ValueError(
            f"{name} has adapters of another kind already ({type(module).__name__}). Merge or unload those first; "
            "keep-zeros and plain adapters do not share a layer."
        )
    layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    _refuse_quantized(name, layer)
    in_attention = isinstance(
        layer, nn.modules.linear.NonDynamicallyQuantizableLinear
    )  # F.multi_head_attention reads it
    if not isinstance(layer, nn.Linear | Conv1D) or in_attention:
        raise ValueError(
            f"Keep-zeros adapters are for nn.Linear and transformers' Conv1D, but {name} is {type(layer).__name__}"
            f"{' inside nn.MultiheadAttention' if in_attention else ''}. "
            f"Leave it out of target_modules (or name it in exclude_modules), or train it whole with "
            f"modules_to_save=['{name.rpartition('.')[2]}']."
        )
    return layer.weight


def _zero_bits(weight: Tensor) -> Any:
    return np.packbits((weight.detach() == 0).flatten().cpu().numpy())


def _targeted_weights(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """Name here, name after unloading, and weight of each matrix that has adapters or is trained whole beside them."""
    for name, weight in model.named_parameters(remove_duplicate=False):
        after = name.replace(".original_module.", ".").replace(".base_layer.", ".")
        if after != name and weight.dim() >= 2:
            yield name, after, weight


def merge(model: PeftModel, reprune: bool = False) -> nn.Module:
    """Merge the active adapters into the weights and return the model without PEFT, still sparse if they keep zeros.

    Keep-zeros adapters merge to W + s (B A) * keep, and every zero is checked afterwards. Plain adapters merge to the
    dense W + s B A; with `reprune` the zeros that the weights had before are put back, and the model that comes out is
    then not the one that was trained: it lacks s B A where W was zero, so evaluate it again. The same holds for the
    matrices in `modules_to_save`, which PEFT trains whole. Needs 1 bit of memory for each targeted weight.

    Args:
        model: what `peft.get_peft_model` or `PeftModel.from_pretrained` returned. It is consumed.
        reprune: put zeros back that plain adapters filled.

    Raises:
        ValueError: the model is no `PeftModel`, has adapters that cannot be merged, or a target is quantised.

    Warns:
        UserWarning: zeros are lost, with the sparsity of the targeted matrices before and after.

    Source: Hu et al. 2021, section 4.1, for merging; Sun et al. 2024 keep the adapters of a pruned model apart.
    """
    if not isinstance(model, PeftModel) or not isinstance(model.base_model, BaseTuner):
        kind = (
            f"a PeftModel of {type(model.base_model).__name__}"
            if isinstance(model, PeftModel)
            else type(model).__name__
        )
        raise ValueError(
            f"merge needs a PeftModel with adapters in its layers, as peft.get_peft_model returns it, not {kind}."
        )
    tuner = model.base_model
    layers = {name: layer for name, layer in tuner.model.named_modules() if isinstance(layer, BaseTunerLayer)}
    for name, layer in layers.items():
        _refuse_quantized(name, layer.get_base_layer())
    names = list(dict.fromkeys([n for layer in layers.values() for n in layer.merged_adapters] + model.active_adapters))
    for layer in layers.values():
        if layer.merged:
            layer.unmerge()  # the zeros are those of the weights without adapters

    keeping = tuple(f"{name}.base_layer." for name, layer in layers.items() if isinstance(layer, KeepZerosLinear))
    before = {after: (name, _zero_bits(weight)) for name, after, weight in _targeted_weights(tuner.model)}
    merged = tuner.merge_and_unload(adapter_names=names)
    after = dict(merged.named_parameters(remove_duplicate=False))
    lost, zeros_before, zeros_after, total = [], 0, 0, 0
    for name, (wrapped, zeros) in before.items():
        if name not in after:
            continue
        now = _zero_bits(after[name])
        total += after[name].numel()
        zeros_before += _count(zeros)
        zeros_after += _count(now)
        if (zeros & ~now).any():
            lost.append(name)
            assert not wrapped.startswith(keeping), f"{name} lost zeros in merging keep-zeros adapters"
            if reprune:
                _put_back(after[name], zeros)
    if lost and not reprune:
        warnings.warn(
            f"Merging took the sparsity of the {len(before)} targeted matrices from {zeros_before / total:.2%} to "
            f"{zeros_after / total:.2%}: plain LoRA and modules_to_save fill zeros (first: {lost[0]}). Train with "
            "KeepZerosLoraConfig, keep the adapters apart, or merge(model, reprune=True) and evaluate again.",
            stacklevel=2,
        )
    return merged


def _count(bits: Any) -> int:
    return int(np.unpackbits(bits).sum())


@torch.no_grad()
def _put_back(weight: Tensor, zeros: Any) -> None:
    flags = torch.from_numpy(np.unpackbits(zeros, count=weight.numel()).view(np.bool_))
    weight.masked_fill_(flags.view(weight.shape).to(weight.device), 0)
