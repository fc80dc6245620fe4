"""Which layers can take a keep-zeros adapter."""

import torch
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
)
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from wanda_lightning.lora.layer import KeepZerosLinear

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
QUANTIZED_ATTRIBUTES = ("qweight", "qzeros", "W_q", "codebooks", "quant_state", "is_quantized")


def is_quantized(layer: nn.Module) -> bool:
    """Whether the weight is codes rather than numbers: bitsandbytes, GPTQ, AWQ, HQQ, AQLM, torchao, float8, ..."""
    weight = getattr(layer, "weight", None)
    if isinstance(weight, Tensor) and isinstance(layer, nn.Linear | Conv1D | nn.Embedding):
        return weight.dtype not in FLOATS or not (type(weight) in (nn.Parameter, Tensor) or isinstance(weight, DTensor))
    return any(hasattr(layer, name) for name in QUANTIZED_ATTRIBUTES) or "quant" in type(layer).__qualname__.lower()


def refuse_quantized(name: str, layer: nn.Module) -> None:
    if is_quantized(layer):
        weight = getattr(layer, "weight", None)
        kind = f"{type(weight).__name__} of {weight.dtype}" if isinstance(weight, Tensor) else "quantised"
        raise ValueError(
            f"{name} is a quantised layer ({type(layer).__name__}, {kind}): merge into quantised weights would lose "
            "zeros: load the model unquantised."
        )


def check_target(name: str, module: nn.Module) -> Tensor:
    """The weight of a layer that can take a keep-zeros adapter."""
    if isinstance(module, BaseTunerLayer) and not isinstance(module, KeepZerosLinear):
        raise ValueError(
            f"{name} has adapters of another kind already ({type(module).__name__}). Merge or unload those first; "
            "keep-zeros and plain adapters do not share a layer."
        )
    layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    refuse_quantized(name, layer)
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
