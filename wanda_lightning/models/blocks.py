"""Find the blocks of a model: its repeated parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from torch import nn

from wanda_lightning.models.layers import Layer


def find_blocks(modules: Mapping[str, nn.Module], layers: Iterable[Layer]) -> list[str]:
    """Return the names of the blocks, given all modules by name and the layers to prune. No block lies inside another.

    The blocks of transformers have a base class of their own (`GradientCheckpointingLayer`). Elsewhere a block is a
    member of a list or sequence that contains at least two layers and no smaller such member: a stage that consists of
    blocks is not a block.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    # The number of distinct modules with layers inside each module.
    names = {layer.module: layer.name.split(".") for layer in layers}.values()
    counts = Counter(".".join(parts[:length]) for parts in names for length in range(len(parts)))
    marked = [name for name, m in modules.items() if isinstance(m, GradientCheckpointingLayer) and counts[name]]
    listed = [name for name in _members_of_lists(modules) if counts[name] >= 2 and name not in marked]
    candidates = marked + [
        name
        for name in listed
        if not any(name.startswith(f"{other}.") or other.startswith(f"{name}.") for other in marked)
    ]
    return [name for name in candidates if not any(other.startswith(f"{name}.") for other in candidates)]


def _members_of_lists(modules: Mapping[str, nn.Module]) -> list[str]:
    return [
        f"{name}.{child}" if name else child
        for name, container in modules.items()
        if _is_list(container) and not name.endswith("experts")
        for child, member in container.named_children()
        if not isinstance(member, nn.ModuleList | nn.Sequential)
    ]


def _is_list(container: nn.Module) -> bool:
    """Whether a module holds others in a sequence, as torchvision's backbones of detectors do in a dictionary."""
    return isinstance(container, nn.ModuleList | nn.Sequential) or type(container).__name__ == "IntermediateLayerGetter"
