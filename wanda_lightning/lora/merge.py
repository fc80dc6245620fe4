"""Merge adapters into the weights and check every zero. `KeepZerosLinear` masks what it merges."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import Module
from transformers.pytorch_utils import Conv1D

from wanda_lightning.common.errors import UserError
from wanda_lightning.core.masking import pack, unpack
from wanda_lightning.lora.keep_zeros_linear import KeepZerosLinear
from wanda_lightning.lora.tuner import refuse_unreadable
from wanda_lightning.models.quantized import is_quantized, quantizer, read_weight


@torch.no_grad()
def merge(model: PeftModel, reprune: bool = False) -> Module:
    """Merge the active adapters into the weights and return the model without PEFT.

    Keep-zeros adapters merge to W + s (B A) * keep, and `merge` checks every zero afterwards, which needs one bit of
    memory per targeted weight. Plain adapters merge to the dense W + s B A, and PEFT trains the matrices in
    `modules_to_save` whole; with `reprune`, `merge` restores the zeros that these filled, which is not the model that
    was trained. If targets are quantized, the whole model is dequantized first.

    Args:
        model: The return value of `peft.get_peft_model` or `PeftModel.from_pretrained`. It must not be used afterwards.
        reprune: Restore the zeros that plain adapters fill.

    Raises:
        ValueError: The adapters cannot be merged, or a quantized layer cannot be dequantized or has plain adapters.

    Warns:
        UserWarning: Zeros are lost.

    Source: Hu et al. 2021, section 4.1, for merging. Sun et al. 2024 do not merge the adapters of a pruned model.
    """
    tuner = model.base_model
    adapted = {
        name: layer
        for name, layer in tuner.model.named_modules()
        if isinstance(layer, BaseTunerLayer)
    }
    _dequantize(tuner.model, adapted)
    merged_names = [name for layer in adapted.values() for name in layer.merged_adapters]
    names = list(dict.fromkeys(merged_names + model.active_adapters))
    for layer in adapted.values():
        if layer.merged:
            layer.unmerge()  # the zeros are read from the weights without adapters

    zeros = _packed_zeros(tuner.model)
    merged = tuner.merge_and_unload(adapter_names=names)
    weights = dict(merged.named_parameters(remove_duplicate=False))
    filled = []
    for name in zeros.keys() & weights.keys():
        weight = weights[name]
        was_zero = unpack(zeros[name], weight.shape).to(weight.device)
        if not (was_zero & (weight != 0)).any():
            continue
        layer = adapted.get(name.removesuffix(".weight"))
        assert not isinstance(layer, KeepZerosLinear), (
            f"{name} lost zeros in merging keep-zeros adapters"
        )
        filled.append(name)
        if reprune:
            weight.masked_fill_(was_zero, 0)
    if filled and not reprune:
        warnings.warn(
            f"merge filled zeros of {len(filled)} of {len(zeros)} targeted matrices, first in {min(filled)}, as "
            "plain LoRA and modules_to_save do. Train with KeepZerosLoraConfig, do not merge, or use "
            "merge(model, reprune=True) and evaluate again.",
            stacklevel=2,
        )
    return merged


def _packed_zeros(model: Module) -> dict[str, Tensor]:
    """Return where each matrix is zero that PEFT adapts or trains whole, by the name that it has without PEFT."""
    zeros = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        # PEFT wraps a layer with adapters as `base_layer`, and one that it trains whole as `original_module`.
        name_after = name.replace(".original_module.", ".").replace(".base_layer.", ".")
        if name_after != name and weight.dim() >= 2:
            zeros[name_after] = pack(weight == 0)
    return zeros


def _dequantize(model: Module, adapted: Mapping[str, BaseTunerLayer]) -> None:
    """Replace all quantized weights by those that `read_weight` returns, if adapters would be merged into some."""
    needed = False
    for name, layer in adapted.items():
        if not is_quantized(layer.get_base_layer()):
            continue
        needed = True
        if not isinstance(layer, KeepZerosLinear):
            raise UserError(
                f"model must have keep-zeros adapters to be merged into quantized weights, but {name} is a "
                f"{type(layer).__name__}. Train with KeepZerosLoraConfig, or load the model without quantization."
            )
    if not needed:
        return
    modules = list(model.named_modules())
    for name, module in modules:
        refuse_unreadable(name, module)

    dtype = getattr(getattr(model, "config", None), "dtype", None)
    for name, module in modules:
        if not is_quantized(module):
            continue
        if quantizer(module) is None:  # the weight is quantized, not the layer
            module.weight = nn.Parameter(read_weight(module), requires_grad=False)
        else:
            model.set_submodule(name, _dequantized_layer(module, dtype))
    loaded_by = getattr(model, "hf_quantizer", None)
    if loaded_by:
        loaded_by.remove_quantization_config(model)


def _dequantized_layer(module: Any, dtype: torch.dtype | None) -> Module:
    """Return an ordinary layer in place of one of a quantization library; by default in the dtype of its weight."""
    weight = read_weight(module)
    layer: Module
    # The class that bitsandbytes replaced. A Conv1D has (d_in, d_out).
    if issubclass(getattr(module, "source_cls", nn.Linear), Conv1D):
        layer = Conv1D(*weight.shape)
        weight = weight.t().contiguous()
    else:
        layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight = nn.Parameter(weight.to(dtype or weight.dtype), requires_grad=False)
    layer.bias = module.bias
    return layer
