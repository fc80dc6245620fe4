"""Add the keep-zeros adapter to PEFT's private registry.

PEFT finds the classes of an adapter by its `peft_type`, a member of the enumeration `PeftType`. It offers no way to
add a member, and `peft.utils.register_peft_method` refuses both an unknown member and a second type with LoRA's prefix
"lora_". So this module writes into the enumeration and into PEFT's three tables. Nothing else in the package does.
"""

from typing import Any

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.utils import PeftType

_NAME = "WANDA_LIGHTNING_KEEP_ZEROS_LORA"  # adapter_config.json holds the value, which PEFT repeats in its KeyError
_VALUE = f"{_NAME} (run 'import wanda_lightning.lora' before loading this adapter)"


def _add_peft_type() -> Any:
    """Return the member of `PeftType`, added unless it exists."""
    if _NAME not in PeftType.__members__:
        member = str.__new__(PeftType, _VALUE)
        member._name_ = _NAME
        member._value_ = _VALUE
        PeftType._member_names_.append(_NAME)
        PeftType._member_map_[_NAME] = PeftType._value2member_map_[_VALUE] = member
        type.__setattr__(PeftType, _NAME, member)  # Enum's own __setattr__ refuses new members
    return PeftType[_NAME]


KEEP_ZEROS_LORA = _add_peft_type()


def register(config_class: type, tuner_class: Any) -> None:
    """Register the classes of adapters of the type `KEEP_ZEROS_LORA` with PEFT."""
    PEFT_TYPE_TO_CONFIG_MAPPING[KEEP_ZEROS_LORA] = config_class
    PEFT_TYPE_TO_TUNER_MAPPING[KEEP_ZEROS_LORA] = tuner_class
    PEFT_TYPE_TO_PREFIX_MAPPING[KEEP_ZEROS_LORA] = tuner_class.prefix
