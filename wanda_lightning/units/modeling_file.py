"""Write the file with which transformers loads a model whose widths no configuration gives.

The configuration has the shapes. Transformers loads the class in the file if `trust_remote_code=True`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wanda_lightning.common.errors import UserError
from wanda_lightning.units.fit_settings import SHAPES

FILE_NAME = "modeling_shrunk"
_FAMILY = "shrunk_family"  # attribute of a class in such a file: the class of transformers that it is made from
_TEMPLATE = '''\
"""{family} with hidden units taken out: the configuration has the shapes that differ. Written by wanda-lightning."""

import torch
from torch import nn
from {module} import {family} as Family

Shapes = dict[str, list[int]]
Numbers = dict[str, dict[str, int]]


{reshape}

class {family}(Family):
    """{family} with widths of its own in some layers."""

    shrunk_family = Family

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        reshape(self, config.shrunk_shapes, config.shrunk_numbers)

    @classmethod
    def is_custom_code(cls):
        """No: transformers renames the tensors in the files as it does for {family}."""
        return False
'''


def write_modeling_file(model: nn.Module, folder: Path) -> None:
    """Write the modeling file into the folder of a model, if it needs one; call it before the model is saved."""
    config: Any = getattr(model, "config", None)
    if config is None or SHAPES not in vars(config):
        return
    family = family_of(model)
    if not family.__module__.startswith("transformers."):
        raise UserError(
            f"The model has widths that no configuration of {family.__name__} gives, and a modeling file can be "
            f"written for classes of transformers only, but this one is from {family.__module__}. Use the model in "
            "memory, export it (torch.export, ONNX), or prune with allocation='uniform'."
        )

    text = _TEMPLATE.format(
        family=family.__name__, module=family.__module__, reshape=source_of(reshape, resized)
    )
    config.auto_map = dict.fromkeys(auto_classes(family, config), f"{FILE_NAME}.{family.__name__}")
    (folder / f"{FILE_NAME}.py").write_text(text, encoding="utf-8")


def family_of(model: Any) -> Any:
    """Return the class of a model, or the one from which a modeling file has made it."""
    return getattr(type(model), _FAMILY, type(model))


def auto_classes(family: Any, config: Any) -> list[str]:
    """Return the names of the classes, such as AutoModelForCausalLM, that load a class of transformers."""
    from transformers.models.auto import modeling_auto

    names = []
    for name, auto in vars(modeling_auto).items():
        # `AutoModel` and its kin; other names there are tables and functions.
        mapping = getattr(auto, "_model_mapping", None)
        if not name.startswith("AutoModel") or mapping is None:
            continue
        classes = mapping.get(type(config), ())
        if family in (classes if isinstance(classes, list | tuple) else [classes]):
            names.append(name)
    return names


def source_of(*functions: Callable[..., Any]) -> str:
    """Return the source of functions, which must use no other names of this package."""
    return "\n\n".join(map(inspect.getsource, functions))


# ---- copied into files, which must work without this package


Shapes = dict[str, list[int]]  # by tensor
Numbers = dict[str, dict[str, int]]  # widths, by module and attribute
Tensors = dict[str, torch.Tensor]


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
