"""Divide a model into its blocks and the rest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from wanda_lightning.models import find_layers

RESIDENT = ""
"""The part of a model that lies outside of all blocks."""


def block_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the blocks of a model, in order."""
    inventory = find_layers(model)
    modules, own = dict(model.named_modules()), {layer.module for layer in inventory.layers}
    names = dict.fromkeys(inventory.blocks[layer.name] for layer in inventory.layers)
    return tuple(name for name in names if modules[name] not in own)


def part_of(name: str, blocks: Iterable[str]) -> str:
    """Return the block that a parameter or module is or lies in, or `RESIDENT`."""
    return next((block for block in blocks if f"{name}.".startswith(f"{block}.")), RESIDENT)


def bytes_by_part(model: nn.Module, blocks: Sequence[str]) -> Mapping[str, int]:
    """Return the size of each block, and of the rest; a tensor with several names counts once."""
    sizes: dict[str, int] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            part = part_of(name, blocks)
            sizes[part] = sizes.get(part, 0) + tensor.numel() * tensor.element_size()
    return sizes
