"""Find the blocks of a model: the repeated modules at which calibration batches wait."""

from collections import Counter
from collections.abc import Iterable, Iterator

from torch import nn

from wanda_lightning.models.expert_stacks import Modules
from wanda_lightning.models.layers import Layer

_LISTS = (nn.ModuleList, nn.Sequential)


def find_blocks(modules: Modules, layers: Iterable[Layer]) -> list[str]:
    """Return the names of the blocks, given all modules by name and the layers to prune. No block lies inside another.

    The blocks of transformers have a base class of their own. Elsewhere a block is a member of a list or sequence that
    contains at least two layers and no smaller such member: a stage that consists of blocks is not a block.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layer_count = _count_layers(layers)
    marked = [
        name
        for name, module in modules.items()
        if isinstance(module, GradientCheckpointingLayer) and layer_count[name]
    ]

    # Lists inside the blocks of transformers, for example of experts, hold no blocks.
    inside_marked = tuple(f"{name}." for name in marked)
    members = [
        name
        for name in _members_of_lists(modules)
        if layer_count[name] >= 2 and not f"{name}.".startswith(inside_marked)
    ]

    candidates = marked + members
    return [
        name for name in candidates if not any(other.startswith(f"{name}.") for other in candidates)
    ]


def _count_layers(layers: Iterable[Layer]) -> Counter[str]:
    """Return the number of distinct modules with layers inside each module, by the module's name."""
    # Experts and groups that share a module count once.
    names = {layer.module: layer.name for layer in layers}
    count = Counter[str]()
    for name in names.values():
        components = name.split(".")
        count.update(".".join(components[:length]) for length in range(len(components)))
    return count


def _members_of_lists(modules: Modules) -> Iterator[str]:
    """Yield the names of the members of lists and sequences, except for experts and for lists in lists."""
    for name, container in modules.items():
        # Torchvision's `IntermediateLayerGetter` is a dictionary whose members run in order.
        is_list = (
            isinstance(container, _LISTS) or type(container).__name__ == "IntermediateLayerGetter"
        )
        if not is_list or name.endswith("experts"):
            continue
        for child, member in container.named_children():
            if not isinstance(member, _LISTS):
                yield f"{name}.{child}" if name else child
