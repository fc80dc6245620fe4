"""Adapt the configuration of a model of transformers from which hidden units were taken out.

If no attributes of the configuration give the shapes of the model, it gets the shapes themselves, which the file of
`modeling_file.py` reads.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from wanda_lightning.units.candidates import Change, replace_attributes
from wanda_lightning.units.fit_settings import (
    NUMBERS,
    SHAPES,
    Setting,
    Settings,
    Sizes,
    changed_sizes,
    differences,
    fit_settings,
)
from wanda_lightning.units.modeling_file import family_of

_IsSame = Callable[[], bool]
_Path = tuple[str, ...]  # of an attribute in a configuration, which may hold other configurations


def fit_configuration(
    model: nn.Module, is_same: _IsSame = lambda: True
) -> tuple[str, Callable[[], None]]:
    """Adapt the configuration of each model of transformers that a model is or contains.

    The model gets a configuration of its own, since another model may have been built from the old one. An attribute
    that has a width by chance stays: `is_same` returns whether the model still computes the same.

    Returned are why no ordinary configuration describes a model, empty if one does; and a function that undoes it.
    """
    from transformers import PreTrainedModel

    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    inner = {other for outer in models for other in outer.modules() if other is not outer}
    outermost = [module for module in models if module not in inner]

    undo = replace_attributes(
        [attribute for module in outermost for attribute in _copied_configurations(module)]
    )
    misfits = [_fit(module, is_same) for module in outermost]
    return "; ".join(filter(None, misfits)), undo


def _copied_configurations(model: Any) -> Iterator[Change]:
    """Yield the attributes of modules that hold the configuration of a model or a part of it, each with a copy."""
    copies: dict[int, Any] = {}  # by the id of the original
    copy.deepcopy(model.config, copies)
    for module in model.modules():
        for name, value in vars(module).items():
            if _is_configuration(value) and id(value) in copies:
                yield module, name, copies[id(value)]


def _fit(model: Any, is_same: _IsSame) -> str:
    """Change the configuration of a model so that it gives its shapes; return why it cannot, or an empty text."""
    family = family_of(model)
    config = model.config
    for name in (SHAPES, NUMBERS):
        vars(config).pop(name, None)
    # Candidates are built from this copy. The model itself reads `config`, in which `_keep_if_same` sets one attribute
    # after the other, and keeps those with which the model still computes the same.
    before = copy.deepcopy(config)

    def changed(settings: Settings) -> Any:
        return _changed(copy.deepcopy(before), settings)

    def built_with(settings: Settings) -> nn.Module:
        from transformers.initialization import no_init_weights

        with torch.device("meta"), no_init_weights():
            return family(changed(settings))

    settings, wrong = fit_settings(
        model,
        built_with,
        options=lambda settings, sizes: _resized_attributes(changed(settings), sizes),
        is_right=lambda settings: _keep_if_same(config, settings[-1], is_same),
    )
    if wrong:
        # Record the shapes themselves, for a file of code beside the weights.
        vars(config).update(differences(model, built_with(settings)))
        new_sizes = sorted({new for _, new in changed_sizes(wrong)})
        shown = ", ".join(map(str, new_sizes[:8]))
        return f"no configuration of {family.__name__} gives the new numbers ({shown})"

    # The modeling file with which the model was loaded is no longer needed.
    if family is not type(model) and getattr(config, "auto_map", None):
        del config.auto_map
    return ""


def _resized_attributes(config: Any, sizes: Sizes) -> Iterator[Setting]:
    """Yield attributes that may hold an old size, with the new one; None stands for a width derived from another."""
    for path, value in _attributes(config):
        for old, new in sizes:
            if value is None or (type(value) is int and value == old):
                yield path, new
            elif isinstance(value, list | tuple) and old in value:
                yield path, type(value)(new if number == old else number for number in value)


def _keep_if_same(config: Any, setting: Setting, is_same: _IsSame) -> bool:
    """Set an attribute in the model's configuration; put it back if the model then computes otherwise."""
    owner = _owner(config, setting[0])
    old = dict(vars(owner))
    _changed(config, (setting,))
    try:
        same = is_same()
    except Exception:  # whatever the model raises for shapes that do not fit
        same = False
    if not same:
        vars(owner).update(old)
    return same


def _attributes(config: Any, path: _Path = ()) -> Iterator[Setting]:
    for name, value in vars(config).items():
        if _is_configuration(value):
            yield from _attributes(value, (*path, name))
        elif not name.startswith("_") and not name.endswith("_token_id"):
            yield (*path, name), value


def _is_configuration(value: object) -> bool:
    from transformers import PretrainedConfig

    return isinstance(value, PretrainedConfig)


def _owner(config: Any, path: _Path) -> Any:
    """Return the configuration that holds the attribute, which may lie inside another one."""
    return functools.reduce(getattr, path[:-1], config)


def _changed(config: Any, settings: Settings) -> Any:
    for path, value in settings:
        setattr(_owner(config, path), path[-1], value)
    return config
