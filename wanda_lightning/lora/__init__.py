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

from wanda_lightning.lora.layer import KeepZerosLinear
from wanda_lightning.lora.merge import merge
from wanda_lightning.lora.register import KEEP_ZEROS_LORA, KeepZerosLoraConfig, KeepZerosLoraModel

__all__ = ["KEEP_ZEROS_LORA", "KeepZerosLinear", "KeepZerosLoraConfig", "KeepZerosLoraModel", "merge"]
