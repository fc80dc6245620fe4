"""Which layers can take a keep-zeros adapter, and what the error says about the others."""

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from wanda_lightning.lora.layer import KeepZerosLinear
from wanda_lightning.models.quantized import is_quantized


def refuse_quantized(name: str, layer: nn.Module) -> None:
    """Raise a ValueError if a layer is quantized: merging would round its weights again and lose zeros."""
    if is_quantized(layer):
        weight = getattr(layer, "weight", None)
        kind = f", {type(weight).__name__} of {weight.dtype}" if isinstance(weight, Tensor) else ""
        raise ValueError(
            f"target_modules must name layers with floating-point weights, but {name} is a quantized layer "
            f"({type(layer).__name__}{kind}), and merging into quantized weights loses zeros. "
            "Load the model without quantization."
        )


def check_target(name: str, module: nn.Module) -> Tensor:
    """Return the weight of a layer that can take a keep-zeros adapter.

    Raises:
        ValueError: The layer already has other adapters, is quantized, or is not a linear layer.
    """
    if isinstance(module, BaseTunerLayer) and not isinstance(module, KeepZerosLinear):
        raise ValueError(
            f"target_modules must name layers without adapters of another type, but {name} already has such adapters "
            f"({type(module).__module__}.{type(module).__name__}). Merge or unload them first."
        )
    layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    refuse_quantized(name, layer)
    in_attention = isinstance(layer, NonDynamicallyQuantizableLinear)  # F.multi_head_attention_forward reads its weight
    if in_attention or not isinstance(layer, nn.Linear | Conv1D):
        raise ValueError(
            f"target_modules must name layers of type nn.Linear or transformers' Conv1D, but {name} is a "
            f"{type(layer).__name__}{' inside nn.MultiheadAttention' if in_attention else ''}. "
            f"Remove it from target_modules (or add it to exclude_modules), or train all of its weights with "
            f"modules_to_save=['{name.rpartition('.')[2]}']."
        )
    return layer.weight
