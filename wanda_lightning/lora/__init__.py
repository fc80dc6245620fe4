"""LoRA adapters for PEFT that merge into a pruned model without filling its zeros.

Plain LoRA (Hu et al. 2021) merges to the dense W + s B A, so Sun et al. 2024 do not merge the adapters of a pruned
model. The adapters in this package are trained as, and merge to, `W + s (B A) * keep` with `keep = (W != 0)`. The zeros
of the frozen weight are the mask, so nothing else is stored.

    model = get_peft_model(pruned, KeepZerosLoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    ...  # train, save_pretrained, PeftModel.from_pretrained, set_adapter: as with any other PEFT adapter
    sparse = merge(model)

Importing this package registers the adapter type with PEFT, so import it before `PeftModel.from_pretrained` loads a
saved adapter. Without the import PEFT raises a `KeyError` that repeats this advice. It never loads a plain LoRA.
"""

from wanda_lightning.common.checks import require_extra

require_extra("lora", "peft", purpose="Adapters")

from wanda_lightning.lora.keep_zeros_linear import KeepZerosLinear as KeepZerosLinear  # noqa: E402
from wanda_lightning.lora.merge import merge as merge  # noqa: E402
from wanda_lightning.lora.register import (  # noqa: E402
    KEEP_ZEROS_LORA as KEEP_ZEROS_LORA,
    register,
)
from wanda_lightning.lora.tuner import (  # noqa: E402
    KeepZerosLoraConfig as KeepZerosLoraConfig,
    KeepZerosLoraModel as KeepZerosLoraModel,
)

register(KeepZerosLoraConfig, KeepZerosLoraModel)
