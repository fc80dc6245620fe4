"""Register the keep-zeros adapter with PEFT, which has no public way to add a kind of adapter."""

import copy
import dataclasses
import warnings
from typing import Any

from peft import LoraConfig, LoraModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
)
from peft.utils import PeftType
from torch import nn
from transformers.pytorch_utils import Conv1D

from wanda_lightning.lora.layer import KeepZerosLinear
from wanda_lightning.lora.targets import check_target

KEEP_ZEROS_LORA = "WANDA_LIGHTNING_KEEP_ZEROS_LORA"  # in adapter_config.json, and in the error of who cannot load it
INITS = (True, False, "gaussian", "orthogonal")  # all others write to the base weight, or need passes of their own


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


class KeepZerosLoraModel(LoraModel):  # type: ignore[misc]  # PEFT is not followed by mypy
    """PEFT's LoRA with `KeepZerosLinear` for each target; made by `get_peft_model` from a `KeepZerosLoraConfig`."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter; warn if there is no zero that it could keep."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        layers = (layer for layer in model.modules() if isinstance(layer, KeepZerosLinear))
        weights = [layer.unmerged_weight() for layer in layers if adapter_name in layer.lora_A]
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
                weight = check_target(name, module)
                if (other := weights.setdefault(id(weight), name)) != name:
                    raise ValueError(
                        f"{other} and {name} share one weight, which cannot take two adapters when they are merged. "
                        f"Target one of them, for example with exclude_modules=['{name}']."
                    )

    def _create_and_replace(
        self, lora_config: Any, adapter_name: str, target: nn.Module, *args: Any, current_key: str, **kwargs: Any
    ) -> None:
        check_target(current_key, target)
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
