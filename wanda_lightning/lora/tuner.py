"""The options of keep-zeros adapters, and how they are inserted into a model."""

import copy
import dataclasses
from typing import Any

from peft import LoraConfig, LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers
from torch import Tensor, nn
from torch.nn import Module
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from wanda_lightning.common.errors import UserError
from wanda_lightning.lora.keep_zeros_linear import KeepZerosLinear
from wanda_lightning.lora.register import KEEP_ZEROS_LORA
from wanda_lightning.models.quantized import can_be_read, is_quantized

# All other initializations of PEFT write to W, or need extra forward passes.
_INITIALIZATIONS = (True, False, "gaussian", "orthogonal")


@dataclasses.dataclass
class KeepZerosLoraConfig(LoraConfig):  # type: ignore[misc]  # PEFT is not followed by mypy
    """Options for LoRA whose merged weight keeps every zero: W + s (B A) * keep, with keep = (W != 0).

    W is (d_out, d_in), A is (r, d_in), B is (d_out, r), and s is lora_alpha / r (lora_alpha / sqrt(r) with
    `use_rslora`): Hu et al. 2021, eq. 3. Use it like `peft.LoraConfig`, which has the same options, on a model that is
    already pruned: without zeros, it is plain LoRA at a higher cost. Targets are nn.Linear and transformers' Conv1D.
    Dropout acts on the input of the adapter.

    A sum in half precision would lose updates that are smaller than half of the last digit of W. Therefore a layer in
    half precision computes two products, one with W and one with the update, and only `merge` rounds the sum
    (bfloat16: by at most 2^-9 of each weight). With W in float32 and no active dropout the layer computes one product,
    and the merged model equals the adapted one. If torchao or bitsandbytes quantized a layer, W is its dequantized
    weight, and the merged model also lacks what the layer rounds in its own forward.

    Raises:
        ValueError: An option of LoRA cannot keep zeros (DoRA and other variants, initializations that write to W,
            `lora_bias`, `target_parameters`, `layer_replication`, Megatron). `get_peft_model` raises it if a target is
            not a linear layer, is quantized in a format whose zeros cannot be read, or shares its weight with another
            target.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = KEEP_ZEROS_LORA
        # PEFT marks the options of DoRA and other variants.
        refused = [
            field.name
            for field in dataclasses.fields(self)
            if field.metadata.get("is_lora_variant")
        ]
        refused += [
            "lora_bias",
            "use_qalora",
            "target_parameters",
            "layer_replication",
            "megatron_config",
        ]
        used = [name for name in refused if getattr(self, name, None)]
        if self.init_lora_weights not in _INITIALIZATIONS:
            used.append("init_lora_weights")
        if used:
            raise UserError(
                f"{used[0]}={getattr(self, used[0])!r} is not supported by KeepZerosLoraConfig, which trains "
                "W + s (B A) * keep. Leave it out, or use peft.LoraConfig, whose merged weights are dense."
            )


class KeepZerosLoraModel(LoraModel):  # type: ignore[misc]  # PEFT is not followed by mypy
    """PEFT's LoRA with a `KeepZerosLinear` in place of each target; `get_peft_model` constructs it."""

    def _prepare_model(self, peft_config: Any, model: Module) -> None:
        """Check all targets before the first one is replaced."""
        super()._prepare_model(peft_config, model)
        # A copy: PEFT writes the names that "all-linear" stands for into the config, after this method.
        config = _maybe_include_all_linear_layers(copy.copy(peft_config), model)
        inside_adapted: list[str] = []  # prefixes of names, as of the matrices of adapters
        names: dict[Tensor, str] = {}
        for name, module in model.named_modules():
            if not name or name.startswith(tuple(inside_adapted)):
                continue
            if isinstance(module, BaseTunerLayer):
                inside_adapted.append(f"{name}.")
            if not self._check_target_module_exists(config, name):
                continue
            other = names.setdefault(check_target(name, module), name)
            if other != name:
                raise UserError(
                    f"target_modules must name layers with weights of their own, but {other} and {name} share one "
                    f"weight. Target one of them, for example with exclude_modules=['{name}']."
                )

    @staticmethod
    def _create_new_module(
        lora_config: Any, adapter_name: str, target: Module, **kwargs: Any
    ) -> Module:
        kwargs.pop("parameter_name", None)
        transposed = isinstance(target, Conv1D)
        layer = KeepZerosLinear(
            target, adapter_name, config=lora_config, is_target_conv_1d_layer=transposed, **kwargs
        )
        layer.dequantizes = is_quantized(target)
        layer.fan_in_fan_out = transposed  # the class of the layer decides, not the config
        return layer


def refuse_unreadable(name: str, layer: Module) -> None:
    """Raise a ValueError if a layer is quantized in a format whose zeros cannot be read."""
    if not can_be_read(layer):
        raise UserError(
            f"model must be in floating point or quantized by torchao or bitsandbytes, but {name} is a quantized layer "
            f"({type(layer).__name__}) whose zeros cannot be read. Load the model without quantization."
        )


def check_target(name: str, module: Module) -> Tensor:
    """Return the weight of a layer that can take a keep-zeros adapter; raise a ValueError for any other layer."""
    if isinstance(module, BaseTunerLayer) and not isinstance(module, KeepZerosLinear):
        raise UserError(
            f"target_modules must name layers without adapters of another type, but {name} already has such adapters "
            f"({type(module).__module__}.{type(module).__name__}). Merge or unload them first."
        )
    layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    refuse_unreadable(name, layer)
    # F.multi_head_attention_forward reads its weight.
    in_attention = isinstance(layer, NonDynamicallyQuantizableLinear)
    if in_attention or not isinstance(layer, nn.Linear | Conv1D):
        where = " inside nn.MultiheadAttention" if in_attention else ""
        raise UserError(
            f"target_modules must name layers of type nn.Linear or transformers' Conv1D, but {name} is a "
            f"{type(layer).__name__}{where}. Remove it from target_modules, or train it whole with modules_to_save."
        )
    return layer.weight
