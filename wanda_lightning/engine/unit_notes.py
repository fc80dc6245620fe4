"""Say how many hidden units are zero, and what taking them out saves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from wanda_lightning.common.words import as_size, count
from wanda_lightning.engine.plan import Plan
from wanda_lightning.models import SkippedMatrix, reads_images
from wanda_lightning.models.module_names import named_modules


@dataclass(frozen=True)
class Cost:
    """The cost of the layers that write, carry or read hidden units."""

    parameters: int
    bytes: int  # with buffers
    multiply_adds: int  # per token, or per image if the model reads images


def cost_without(plan: Plan, removed: Mapping[str, int]) -> Cost:
    """Return the cost if so many of the hidden units that each layer reads are taken out."""
    entries: dict[tuple[nn.Module, str], dict[int, int]] = {}  # that are taken out of each tensor, by dimension
    for reader, units in plan.coupled.items():
        for slot in units.slots:
            copies = slot.tensor.shape[slot.dim] // units.width
            entries.setdefault((slot.module, slot.name), {})[slot.dim] = copies * removed.get(reader, 0)
    parameters = size = multiply_adds = 0
    for (module, name), taken in entries.items():
        tensor = getattr(module, name)
        left = math.prod(length - taken.get(dim, 0) for dim, length in enumerate(tensor.shape))
        parameters += left if isinstance(tensor, nn.Parameter) else 0
        size += left * tensor.element_size()
        multiply_adds += left * plan.positions.get(module, 1) if tensor.ndim > 1 else 0
    return Cost(parameters, size, multiply_adds)


def with_zero_filters(
    plan: Plan, zero_units: Mapping[str, int], skipped: Sequence[SkippedMatrix]
) -> list[SkippedMatrix]:
    """Say of each depthwise convolution between layers how many of its filters belong to hidden units that are zero."""
    names = {module: name for name, module in named_modules(plan.model).items()}
    zero = {
        names[slot.module]: zero_units.get(reader, 0)
        for reader, units in plan.coupled.items()
        for slot in units.slots
        if slot.tensor.ndim > 1
    }
    return [
        replace(each, detail=f"{each.detail}; {number:,} of its filters are those of hidden units that are zero")
        if (number := zero.get(each.name, 0))
        else each
        for each in skipped
    ]


def note_on_units(plan: Plan, zero_units: Mapping[str, int], parameters: int) -> str:
    """Describe the hidden units that are zero, by the layer that reads them, in a model with so many parameters."""
    zero, width = sum(zero_units.values()), sum(units.width for units in plan.coupled.values())
    if not zero:
        return (
            f"none of {width:,} hidden units is zero, because sparsity={plan.config.sparsity:g} rounds to no unit of "
            "any layer: use a smaller multiple_of, or a higher sparsity"
        )
    before, after = cost_without(plan, {}), cost_without(plan, zero_units)
    removed = before.parameters - after.parameters
    return (
        f"{zero:,} of {width:,} hidden units are zero; shrink() takes out {removed:,} of {parameters:,} parameters "
        f"({removed / parameters:.1%}). The layers with hidden units then have {as_size(after.bytes)} instead of "
        f"{as_size(before.bytes)}, and {count(after.multiply_adds)} instead of {count(before.multiply_adds)} "
        f"multiply-adds per {'image' if reads_images(plan.model) else 'token'}"
    )
