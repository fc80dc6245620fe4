"""Adapt the configuration of a model of transformers from which hidden units were taken out.

If no attributes of the configuration give the shapes of the model, it gets the shapes themselves, and the model a class
of `modeling_shrunk.py`, which reads them.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import Module

from wanda_lightning.common.aliases import Action
from wanda_lightning.common.errors import UserError
from wanda_lightning.units import modeling_shrunk
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

_IsSame = Callable[[], bool]
_Path = tuple[str, ...]  # of an attribute in a configuration, which may hold other configurations


def fit_configuration(model: Module, is_same: _IsSame = lambda: True) -> tuple[str, Action]:
    """Adapt the configuration of each model of transformers that a model is or contains, and its class if necessary.

    The model gets a configuration of its own, since another model may have been built from the old one. An attribute
    that has a width by chance stays: `is_same` returns whether the model still computes the same.

    Returned are why no ordinary configuration describes a model, empty if one does; and a function that undoes it.
    """
    from transformers import PreTrainedModel

    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    inner = {other for outer in models for other in outer.modules() if other is not outer}
    outermost = [module for module in models if module not in inner]

    misfits = []

    def changes() -> Iterator[Change]:
        for module in outermost:
            yield from list(_copied_configurations(module))
            misfits.append(_fit(module, is_same))
            yield module, "__class__", _fitting_class(module)

    undo = replace_attributes(changes())
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
    family = _family_of(model)
    config = model.config
    for name in (SHAPES, NUMBERS):
        vars(config).pop(name, None)
    # Candidates are built from this copy. The model itself reads `config`, in which `_keep_if_same` sets one attribute
    # after the other, and keeps those with which the model still computes the same.
    before = copy.deepcopy(config)

    def changed(settings: Settings) -> Any:
        return _changed(copy.deepcopy(before), settings)

    def built_with(settings: Settings) -> Module:
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
        why = f"no configuration of {family.__name__} gives the new numbers ({shown})"
        if not family.is_backend_compatible():
            why += ", and vLLM and SGLang cannot serve it, because this class computes attention in its own way"
        return why

    # The modeling file with which the model was loaded is no longer needed.
    if family is not type(model) and getattr(config, "auto_map", None):
        del config.auto_map
    return ""


def _family_of(model: Any) -> Any:
    """Return the class of a model, or the one from which a modeling file has made it."""
    return getattr(type(model), "shrunk_family", type(model))


def _fitting_class(model: Any) -> type:
    """Return the class that builds the model from its configuration, and name it there if it is not of transformers."""
    family = _family_of(model)
    config = model.config
    if SHAPES not in vars(config):
        return family
    names = auto_classes(family, config)
    is_of_transformers = family.__module__.startswith("transformers.")
    if not is_of_transformers or family.__name__ not in names.values():
        return type(model)  # `refuse_unloadable` refuses to save it

    file = modeling_shrunk.__name__.rpartition(".")[2]
    config.auto_map = {
        auto: f"{file}.{modeling_shrunk.PREFIX}{name}" for auto, name in names.items()
    }
    fitting = getattr(modeling_shrunk, modeling_shrunk.PREFIX + family.__name__)
    # From now on, `save_pretrained` writes the file of the class, too.
    fitting.register_for_auto_class(next(a for a, name in names.items() if name == family.__name__))
    return fitting


def auto_classes(family: Any, config: Any) -> dict[str, str]:
    """Return the class of transformers that each Auto class, such as AutoModel, loads for a configuration.

    Where there is a choice, it is `family`.
    """
    from transformers.models.auto import modeling_auto

    names = {}
    for auto_name, auto in vars(modeling_auto).items():
        # `AutoModel` and its kin; other names there are tables and functions.
        mapping = getattr(auto, "_model_mapping", None)
        if not auto_name.startswith("AutoModel") or mapping is None:
            continue
        classes = mapping.get(type(config), ())
        if not isinstance(classes, list | tuple):
            classes = [classes]
        if classes:
            chosen = family if family in classes else classes[0]
            names[auto_name] = chosen.__name__
    return names


def refuse_unloadable(model: Module) -> None:
    """Refuse to save a model that nothing could load: it needs a class of its own, but has one of another library."""
    config = getattr(model, "config", None)
    if config is None or SHAPES not in vars(config):
        return
    family = type(model)
    if not hasattr(family, "shrunk_family"):
        raise UserError(
            f"The model has widths that no configuration of {family.__name__} gives, and a modeling file can be "
            "written only for classes of transformers that an Auto class loads, but this one is from "
            f"{family.__module__}. Use the model in memory, export it (torch.export, ONNX), or shrink with "
            "by='equal'."
        )


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
