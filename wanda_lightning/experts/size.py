"""Find how many experts fit into a size."""

import re
from collections.abc import Mapping

from torch.nn import Module

from wanda_lightning.common.errors import UserError
from wanda_lightning.experts.mixtures import mixtures
from wanda_lightning.models.layers import named_modules

_UNITS = {"B": 1, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SIZE = re.compile(rf"(\d+(?:\.\d+)?) ?({'|'.join(_UNITS)})", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Return a number of bytes.

    Raises:
        UserError: For text that is not a number with a unit.

    Example:
        >>> parse_size("60GB"), parse_size("1.5 GiB")
        (60000000000, 1610612736)
    """
    match = _SIZE.fullmatch(text)
    if not match:
        raise UserError(
            f"max_size must be a number with a unit ({', '.join(_UNITS)}), such as 60GB or 55.9GiB, but it is {text!r}."
        )
    return int(float(match[1]) * _UNITS[match[2].upper()])


def fitting_sparsity(model: Module, sizes: Mapping[str, int], limit: int) -> tuple[float, str]:
    """Return the smallest fraction of experts to remove so that a model fits, and a sentence that says so.

    Args:
        model: A model with mixtures of experts, which may be on the meta device.
        sizes: Bytes by name of a parameter; other tensors count, too, as an expert's if their name says so.
        limit: Largest number of bytes.
    """
    found = list(mixtures(model))
    if not found:
        raise UserError("max_size needs a mixture of experts, but the model has none.")
    names = {module: name for name, module in named_modules(model).items()}
    of_experts = {
        f"{names[slot.module]}.{slot.name}" for mixture in found for slot in mixture.slots
    }
    number = found[0].number
    groups = found[0].groups

    dense = sum(sizes.values())
    each = 0.0  # bytes of one expert in all layers
    for name, size in sizes.items():
        if name in of_experts or ".experts." in name:
            each += size / number
    rest = dense - each * number

    kept = int((limit - rest) // each)
    kept -= kept % groups
    if kept >= number:
        raise UserError(
            f"max_size must be less than the size of the model, {_gb(dense)}, but it is {_gb(limit)}: no expert has to "
            "be removed."
        )
    if kept <= 0:
        smallest = _gb(rest + each * groups)
        raise UserError(
            f"max_size must be at least {smallest}, the size with {groups} of {number} experts in each layer, but it "
            f"is {_gb(limit)}."
        )
    sentence = (
        f"max_size={_gb(limit)} keeps {kept} of {number} experts in each layer: about {_gb(rest + each * kept)} of "
        f"{_gb(dense)}."
    )
    return 1 - kept / number, sentence


def _gb(size: float) -> str:
    return f"{size / 1e9:.4g} GB"
