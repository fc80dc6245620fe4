"""The type of keep-zeros adapters, by which PEFT finds their classes.

PEFT looks up the classes of an adapter by its `peft_type` in three public tables. `peft.utils.register_peft_method`
fills them only for members of PEFT's own enumeration `PeftType`, and no member can be added to an enumeration. But the
keys are compared as text, so a member of another enumeration of texts will do.
"""

from enum import Enum
from typing import Any

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING


class _PeftType(str, Enum):  # noqa: UP042  # PEFT takes the name from `str(member)`, which `StrEnum` changes
    # adapter_config.json holds the value, which PEFT repeats in its KeyError.
    WANDA_LIGHTNING_KEEP_ZEROS_LORA = (
        "WANDA_LIGHTNING_KEEP_ZEROS_LORA "
        "(run 'import wanda_lightning.lora' before loading this adapter)"
    )


KEEP_ZEROS_LORA = _PeftType.WANDA_LIGHTNING_KEEP_ZEROS_LORA


def register(config_class: type, tuner_class: Any) -> None:
    """Register the classes of adapters of the type `KEEP_ZEROS_LORA` with PEFT."""
    PEFT_TYPE_TO_CONFIG_MAPPING[KEEP_ZEROS_LORA] = config_class
    PEFT_TYPE_TO_TUNER_MAPPING[KEEP_ZEROS_LORA] = tuner_class
    PEFT_TYPE_TO_PREFIX_MAPPING[KEEP_ZEROS_LORA] = tuner_class.prefix
