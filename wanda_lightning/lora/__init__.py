"""LoRA adapters for PEFT that merge into a pruned model without filling its zeros.

Plain LoRA (Hu et al. 2021) merges to W + s B A, which is dense. For that reason Sun et al. 2024 do not merge the
adapters of a pruned model. The adapters in this package are trained as `W + s (B A) * keep` with `keep = (W != 0)`,
which is also what they merge to. The zeros of the frozen weight are the mask, so nothing else is stored.

    model = get_peft_model(pruned, KeepZerosLoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    ...  # train, save_pretrained, PeftModel.from_pretrained, set_adapter: as with any other PEFT adapter
    sparse = merge(model)

Importing this package registers the adapter type with PEFT. A process that loads a saved adapter must import it first:

    import wanda_lightning.lora
    model = PeftModel.from_pretrained(pruned, "adapter")

Without the import PEFT stops with a `KeyError` that repeats this advice. It never loads the adapter as a plain LoRA.
The README.md in the saved adapter folder shows these two lines, too.
"""

from wanda_lightning.lora.config import KeepZerosLoraConfig
from wanda_lightning.lora.layer import KeepZerosLinear
from wanda_lightning.lora.merge import merge
from wanda_lightning.lora.register import KEEP_ZEROS_LORA, register
from wanda_lightning.lora.tuner import KeepZerosLoraModel

register(KeepZerosLoraConfig, KeepZerosLoraModel)

__all__ = ["KEEP_ZEROS_LORA", "KeepZerosLinear", "KeepZerosLoraConfig", "KeepZerosLoraModel", "merge"]
