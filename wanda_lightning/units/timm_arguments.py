"""Find the arguments with which timm builds a model from which hidden units were taken out, and save it for timm.

If no arguments give the shapes of the model, they are the shapes themselves, and those of `shrunk_model`.
"""

import inspect
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.nn import Module

from wanda_lightning.common.aliases import Kwargs
from wanda_lightning.common.errors import UserError
from wanda_lightning.units.fit_settings import (
    NUMBERS,
    SHAPES,
    Setting,
    Sizes,
    changed_sizes,
    differences,
    fit_settings,
    wrong_shapes,
)
from wanda_lightning.units.modeling_shrunk import reshape
from wanda_lightning.units.shrunk_model import COPIED_FUNCTIONS, shrunk_model
from wanda_lightning.units.without_values import WithoutValues

_BASE = "shrunk_from"  # the argument of `shrunk_model` that names a model of timm
_TEMPLATE = '''\
"""Register shrunk_model: any model of timm with hidden units taken out. Written by wanda-lightning.

After `import modeling_shrunk`, timm.create_model("local-dir:FOLDER", pretrained=True) loads the folder of this file.
"""

from typing import Any

import timm
import torch
from torch import nn

Shapes = dict[str, list[int]]
Numbers = dict[str, dict[str, int]]
Tensors = dict[str, torch.Tensor]


{functions}

register_shrunk_model()
'''


def save_for_timm(model: Any, name: str, arguments: Kwargs, labels: Kwargs, folder: Path) -> None:
    """Write a folder that timm loads, with a file of its own if no arguments of timm give the model's shapes.

    `name` and `arguments` are those of `fit_arguments`; `labels` go into the configuration.
    """
    from timm.models import save_for_hf

    config = {"architecture": name, **labels}
    save_for_hf(
        model, str(folder), model_config=config, model_args=arguments, safe_serialization=True
    )
    if name == shrunk_model.__name__:
        # The functions use no other names of this package.
        functions = "\n\n".join(inspect.getsource(function) for function in COPIED_FUNCTIONS)
        text = _TEMPLATE.format(functions=functions)
        (folder / "modeling_shrunk.py").write_text(text, encoding="utf-8")


def fit_arguments(model: Any, arguments: Kwargs) -> tuple[str, Kwargs]:
    """Return the name and the arguments with which `timm.create_model` builds a model with the shapes of this one.

    Each number among the arguments of the model's class, such as `mlp_ratio`, is scaled as the widths were. If none
    give the shapes, the name is `shrunk_model`, and its arguments are the shapes. `arguments` are those of
    `timm.create_model` beside the name. Raises a ValueError for a model with other modules.
    """
    from timm.models import get_model_args

    known = {**get_model_args(model), **arguments}
    # The model may have been loaded from a folder of a `shrunk_model`.
    for key in (SHAPES, NUMBERS):
        known.pop(key, None)
    base = known.pop(_BASE, None)
    name = base or model.pretrained_cfg["architecture"]
    try:
        built = _build(name, known)
    except Exception:  # timm cannot build it without its shapes, either: nothing is known about it
        if base:
            raise
        return name, dict(arguments)

    # If equal widths became different ones, no argument gives them.
    sizes = changed_sizes(wrong_shapes(model, built))
    is_even = len(sizes) == len({old for old, _ in sizes})
    if base is None and is_even:
        settings, wrong = fit_settings(
            model,
            lambda settings: _build(name, known | dict(settings)),
            lambda settings, sizes: _scaled_arguments(
                _all_arguments(type(model), name, known | dict(settings)), sizes
            ),
        )
        if not wrong:
            return name, {**arguments, **dict(settings)}

    # `built` becomes what `shrunk_model` would build, to see whether it is this model.
    different = differences(model, built)
    reshape(built, different[SHAPES], different[NUMBERS])
    _refuse_other_modules(model, built, name)
    return shrunk_model.__name__, {**arguments, _BASE: name, **different}


def _refuse_other_modules(model: Module, built: Module, name: str) -> None:
    lines = str(model).splitlines()
    built_lines = str(built).splitlines()
    for line, built_line in itertools.zip_longest(lines, built_lines, fillvalue="nothing"):
        if line != built_line:
            raise UserError(
                f"save_pretrained writes a folder that timm.create_model can build, but {name} of timm has "
                f"`{built_line.strip()}` where this model has `{line.strip()}`. Keep the module in memory and export "
                "it (torch.export, ONNX), which takes any model."
            )


def _scaled_arguments(arguments: Kwargs, sizes: Sizes) -> Iterator[Setting]:
    """Yield arguments of which one number, or all numbers in a list, are scaled as a size was."""
    # A width is often int(channels * ratio): half a unit more protects it against rounding.
    ratios = [(new + extra) / old for extra in (0, 0.5) for old, new in sorted(sizes)]
    ratios = list(dict.fromkeys(ratios))
    ratios += [1 / ratio for ratio in ratios]
    for key, value in arguments.items():
        for ratio in ratios:
            scaled = _scaled(value, ratio)
            if scaled not in (None, value):
                yield key, scaled


def _scaled(value: Any, ratio: float) -> Any:
    """Return a number, or the numbers in a list, times the ratio; None for anything else."""
    if isinstance(value, list | tuple):
        scaled = [_scaled(entry, ratio) for entry in value]
        return None if None in scaled else scaled
    if type(value) not in (int, float):  # a bool is no number
        return None

    number = value * ratio
    if type(value) is int and abs(number - round(number)) < 1e-6:
        return round(number)
    return number


def _build(name: str, arguments: Kwargs) -> Module:
    import timm

    with torch.device("meta"), WithoutValues():
        return timm.create_model(name, **arguments)


def _all_arguments(family: Any, name: str, arguments: Kwargs) -> Kwargs:
    """Return all arguments that the class of a model gets from timm, with defaults."""
    settings = {}
    original = family.__init__

    # timm adds arguments of its own to those of the caller, and only the class sees all.
    def recording(*args: Any, **kwargs: Any) -> None:
        bound = inspect.signature(original).bind(*args, **kwargs)
        bound.apply_defaults()
        settings.update(bound.arguments)
        original(*args, **kwargs)

    with patch.object(family, "__init__", recording):
        _build(name, arguments)
    del settings["self"]
    further = settings.pop("kwargs", {})
    return settings | further
