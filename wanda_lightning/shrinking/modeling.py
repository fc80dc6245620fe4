"""Write the modeling file of a shrunk model whose shapes no configuration of its family gives.

Transformers loads a class of its own for a folder with such a file and an `auto_map` in its configuration, if
`trust_remote_code=True`. The file needs transformers only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from wanda_lightning.common.errors import UserError
from wanda_lightning.shrinking.configuration import FAMILY, NUMBERS, SHAPES, family_of

_NAME = "modeling_shrunk"
_TEMPLATE = '''\
"""{family} with hidden units taken out: the configuration has the shapes that differ. Written by wanda-lightning."""

import torch
from torch import nn
from {module} import {family} as Family


class {family}(Family):
    """{family} with widths of its own in some layers."""

    {attribute} = Family

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        for name, shape in config.{shapes}.items():
            place, _, name = name.rpartition(".")
            module = self.get_submodule(place)
            old = getattr(module, name)
            new = torch.zeros(shape, dtype=old.dtype, device=old.device)
            setattr(module, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
        for place, widths in config.{numbers}.items():
            for name, width in widths.items():
                setattr(self.get_submodule(place), name, width)

    @classmethod
    def is_custom_code(cls):
        """No: transformers renames the tensors in the files as it does for {family}."""
        return False
'''


def write_modeling_file(model: nn.Module, folder: Path) -> None:
    """Write the modeling file into the folder of a model, if it needs one; call it before the model is saved.

    Raises:
        ValueError: If the class of the model is not in transformers, so that no file could import it.
    """
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
    names = {"family": family.__name__, "module": family.__module__, "attribute": FAMILY}
    text = _TEMPLATE.format(**names, shapes=SHAPES, numbers=NUMBERS)
    config.auto_map = dict.fromkeys(_auto_classes(family, config), f"{_NAME}.{family.__name__}")
    (folder / f"{_NAME}.py").write_text(text, encoding="utf-8")


def _auto_classes(family: Any, config: Any) -> list[str]:
    """Return the names of the classes, such as AutoModelForCausalLM, that load a class of transformers."""
    from transformers.models.auto import modeling_auto

    found = []
    for name, auto in vars(modeling_auto).items():
        if name.startswith("AutoModel") and getattr(auto, "_model_mapping", None) is not None:
            loaded = auto._model_mapping.get(type(config), ())
            if family in (loaded if isinstance(loaded, list | tuple) else [loaded]):
                found.append(name)
    return found
