"""The options of a keep-zeros adapter."""

import dataclasses

from peft import LoraConfig

from wanda_lightning.common.errors import UserError
from wanda_lightning.lora.register import KEEP_ZEROS_LORA

_INITIALIZATIONS = (True, False, "gaussian", "orthogonal")  # the others write to W, or need extra forward passes


@dataclasses.dataclass
class KeepZerosLoraConfig(LoraConfig):  # type: ignore[misc]  # PEFT is not followed by mypy
    """Options for LoRA whose merged weight keeps every zero: W + s (B A) * keep, with keep = (W != 0).

    W is (d_out, d_in), A is (r, d_in), B is (d_out, r), and s is lora_alpha / r (lora_alpha / sqrt(r) with
    `use_rslora`): Hu et al. 2021, eq. 3. Use it like `peft.LoraConfig`, which has the same options, on a model that is
    already pruned: without zeros, it is plain LoRA at a higher cost. Targets are nn.Linear and transformers' Conv1D.
    Dropout acts on the input of the adapter.

    A sum in half precision would lose updates that are smaller than half of the last digit of W. Therefore a layer in
    half precision computes two products, one with W and one with the update, and only `merge` rounds the sum. The
    merged and the adapted model then differ by that rounding (bfloat16: at most 2^-9 of each weight). With W in
    float32 and no active dropout the layer computes one product, and the merged model equals the adapted one.

    If torchao or bitsandbytes quantized a layer, W is its dequantized weight, which exists only while it is needed. The
    merged and the adapted model also differ by what the layer rounds in its own forward: the int8 layers of
    bitsandbytes quantize their inputs, for example.

    Raises:
        ValueError: An option of LoRA cannot keep zeros (DoRA and other variants, initializations that write to W,
            `target_parameters`, `layer_replication`, Megatron). `get_peft_model` raises it if a target is not a linear
            layer, is quantized in a format whose zeros cannot be read, or shares its weight with another target.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = KEEP_ZEROS_LORA
        refused = [field.name for field in dataclasses.fields(self) if field.metadata.get("is_lora_variant")]
        refused += ["use_qalora", "target_parameters", "layer_replication", "megatron_config"]
        used = [name for name in refused if getattr(self, name, None)]
        if used := used + ["init_lora_weights"] * (self.init_lora_weights not in _INITIALIZATIONS):
            raise UserError(
                f"{used[0]}={getattr(self, used[0])!r} is not supported by KeepZerosLoraConfig, which trains "
                "W + s (B A) * keep. Leave it out, or use peft.LoraConfig, whose merged weights are dense."
            )
