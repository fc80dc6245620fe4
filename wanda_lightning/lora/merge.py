"""Merge adapters into the weights and check every zero."""

import warnings
from collections.abc import Mapping

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from wanda_lightning.common.errors import UserError
from wanda_lightning.core.masking import pack, unpack
from wanda_lightning.lora.keep_zeros_linear import KeepZerosLinear
from wanda_lightning.lora.tuner import refuse_unreadable
from wanda_lightning.models.quantized import is_quantized, quantizer, read_weight


@torch.no_grad()
def merge(model: PeftModel, reprune: bool = False) -> nn.Module:
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
    layers = {
        name: layer
        for name, layer in tuner.model.named_modules()
        if isinstance(layer, BaseTunerLayer)
    }
    _dequantize(tuner.model, layers)
    names = list(
        dict.fromkeys(
            [n for layer in layers.values() for n in layer.merged_adapters] + model.active_adapters
        )
    )
    for layer in layers.values():
        if layer.merged:
            layer.unmerge()  # the zeros are read from the weights without adapters

    keeping = tuple(
        f"{name}.base_layer."
        for name, layer in layers.items()
        if isinstance(layer, KeepZerosLinear)
    )
    before = {}  # of each matrix that PEFT adapts or trains whole, by its name after unloading: its name and zeros
    for name, weight in tuner.model.named_parameters(remove_duplicate=False):
        after = name.replace(".original_module.", ".").replace(".base_layer.", ".")
        if after != name and weight.dim() >= 2:
            before[after] = name, pack(weight == 0)
    merged = tuner.merge_and_unload(adapter_names=names)
    weights = dict(merged.named_parameters(remove_duplicate=False))
    filled: list[str] = []
    for name in before.keys() & weights.keys():
        weight, (wrapped_name, packed) = weights[name], before[name]
        was_zero = unpack(packed, weight.shape).to(weight.device)
        if (was_zero & (weight != 0)).any():
            assert not wrapped_name.startswith(keeping), (
                f"{name} lost zeros in merging keep-zeros adapters"
            )
            filled.append(name)
            if reprune:
                weight.masked_fill_(was_zero, 0)
    if filled and not reprune:
        warnings.warn(
            f"merge filled zeros of {len(filled)} of {len(before)} targeted matrices, first in {min(filled)}, as plain "
            f"LoRA and modules_to_save do. Train with KeepZerosLoraConfig, do not merge, or use "
            "merge(model, reprune=True) and evaluate again.",
            stacklevel=2,
        )
    return merged


def _dequantize(model: nn.Module, layers: Mapping[str, BaseTunerLayer]) -> None:
    """Replace all quantized weights by those that `read_weight` returns, if adapters would be merged into some."""
    quantized = {
        name: layer for name, layer in layers.items() if is_quantized(layer.get_base_layer())
    }
    for name, wrapped in quantized.items():
        if not isinstance(wrapped, KeepZerosLinear):
            raise UserError(
                f"model must have keep-zeros adapters to be merged into quantized weights, but {name} is a "
                f"{type(wrapped).__name__}. Train with KeepZerosLoraConfig, or load the model without quantization."
            )
    modules = list(model.named_modules()) if quantized else []
    for name, module in modules:
        refuse_unreadable(name, module)
    for name, module in modules:
        if not is_quantized(module):
            continue
        weight = nn.Parameter(read_weight(module), requires_grad=False)
        if quantizer(module) is None:  # the weight is quantized, not the layer
            module.weight = weight
            continue
        dtype = getattr(getattr(model, "config", None), "dtype", None) or weight.dtype
        # Which bitsandbytes replaced; (d_in, d_out).
        if issubclass(getattr(module, "source_cls", nn.Linear), Conv1D):
            layer: nn.Module = Conv1D(*weight.shape)
            weight = nn.Parameter(weight.t().contiguous(), requires_grad=False)
        else:
            layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        layer.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        layer.bias = module.bias
        model.set_submodule(name, layer)
    if quantized and (loaded_by := getattr(model, "hf_quantizer", None)) is not None:
        loaded_by.remove_quantization_config(model)
