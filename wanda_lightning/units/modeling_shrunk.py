"""Models of transformers from which hidden units were taken out, so that layers have widths of their own.

`config.json` lists the shapes that differ from those which its other settings give, and names classes of this file:
`ShrunkLlamaModel` is `LlamaModel` with these shapes. The file is the same in all folders of such models. It is a part
of wanda-lightning, but needs only PyTorch and transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

PREFIX = "Shrunk"  # of the names of classes

Shapes = dict[str, list[int]]  # by tensor
Numbers = dict[str, dict[str, int]]  # widths, by module and attribute
Tensors = dict[str, torch.Tensor]


class Shrunk:
    """What all classes of this file add to a class of transformers, `shrunk_family`."""

    shrunk_family: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        shapes = own_names(self, config.shrunk_shapes)
        reshape(self, shapes, own_names(self, config.shrunk_numbers))  # type: ignore[arg-type]

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: transformers renames the tensors in the files as it does for its own class."""
        return False

    # Transformers looks for these in the text of the file with the class.

    @classmethod
    def _can_set_attn_implementation(cls) -> Any:
        return cls.shrunk_family._can_set_attn_implementation()

    @classmethod
    def _can_set_experts_implementation(cls) -> Any:
        return cls.shrunk_family._can_set_experts_implementation()


def __getattr__(name: str) -> type:
    """Make the class with a name: `ShrunkLlamaModel` from `LlamaModel`."""
    import transformers

    family = getattr(transformers, name.removeprefix(PREFIX), None)
    if not name.startswith(PREFIX) or family is None:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    made = type(name, (Shrunk, family), {"__module__": __name__, "shrunk_family": family})
    globals()[name] = made
    return made


def own_names(model: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Return values by the names of tensors or modules in this model, which may have a head, or be saved without it."""
    prefix = f"{model.base_model_prefix}."
    names = {*dict(model.named_modules()), *model.state_dict()}
    by_own_name = {}
    for name, value in values.items():
        for own in (name, name.removeprefix(prefix), prefix + name):
            if own in names:
                by_own_name[own] = value
                break
    return by_own_name


def reshape(model: nn.Module, shapes: Shapes, numbers: Numbers) -> None:
    """Give tensors other shapes, with what fits of their entries, and modules other widths."""
    for full_name, shape in shapes.items():
        module_name, _, name = full_name.rpartition(".")
        module = model.get_submodule(module_name)
        old = getattr(module, name)
        new = resized(old.detach(), shape)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, old.requires_grad)
        setattr(module, name, new)

    for module_name, widths in numbers.items():
        for name, width in widths.items():
            setattr(model.get_submodule(module_name), name, width)


def resized(old: torch.Tensor, shape: list[int]) -> torch.Tensor:
    """Return a tensor of another shape, with what fits of the entries, and zeros."""
    new = torch.zeros(shape, dtype=old.dtype, device=old.device)
    kept = old[tuple(map(slice, shape))]
    new[tuple(map(slice, kept.shape))] = kept
    return new
