"""Find the configuration that describes a model of transformers after hidden units were taken out of it.

No table of families says which attribute holds a width. Each attribute that has the old one is set to the new one, and
the model is built on the meta device: an attribute is right if more shapes fit.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from wanda_lightning.models.hidden_units import replace_attributes

SHAPES = "shrunk_shapes"
"""Attribute of a configuration: by parameter or buffer, the shape that no other attribute says."""
NUMBERS = "shrunk_numbers"
"""Attribute of a configuration: by module, the widths among its attributes that no other attribute says."""
FAMILY = "shrunk_family"
"""Attribute of a class in a modeling file: the class of transformers that it is made from."""

Shapes = Mapping[str, tuple[int, ...]]
Wrong = dict[str, tuple[tuple[int, ...], tuple[int, ...]]]  # by tensor: the shape as built, and the right one


def fit_configuration(model: nn.Module, is_same: Callable[[], bool] = lambda: True) -> tuple[str, Callable[[], None]]:
    """Adapt the configuration of each model of transformers that a model is or contains.

    The model gets a configuration of its own, since another model may have been built from the old one.

    If no attributes of the family give the new shapes, the shapes themselves are added to the configuration, for a
    modeling file that `write_modeling_file` writes.

    Args:
        model: The model without the units.
        is_same: Whether the model still computes the same: its forward may read an attribute that has a width by
            chance.

    Returns:
        Why no ordinary configuration describes a model, empty if one does; and a function that undoes the change.
    """
    from transformers import PreTrainedModel

    found = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    inner = {each for outer in found for each in outer.modules() if each is not outer}
    outermost = [each for each in found if each not in inner]
    undo = replace_attributes([attribute for each in outermost for attribute in _own_configuration(each)])
    return "; ".join(filter(None, (_fit(each, is_same) for each in outermost))), undo


def _own_configuration(model: Any) -> Iterator[tuple[nn.Module, str, Any]]:
    """Yield the attributes of modules that hold the configuration of a model or a part of it, each with a copy."""
    copies: dict[int, Any] = {}
    copy.deepcopy(model.config, copies)
    for module in model.modules():
        for name, value in vars(module).items():
            if _is_configuration(value) and id(value) in copies:
                yield module, name, copies[id(value)]


def family_of(model: nn.Module) -> Any:
    """Return the class of a model, or the one from which a modeling file has made it."""
    return getattr(type(model), FAMILY, type(model))


def _fit(model: Any, is_same: Callable[[], bool]) -> str:
    """Change the configuration of a model so that it gives the shapes of the model."""
    family, config = family_of(model), copy.deepcopy(model.config)
    for each in (config, model.config):
        for name in {SHAPES, NUMBERS} & vars(each).keys():
            delattr(each, name)
    built, target = _built_shapes(family, config), shapes_of(model)
    target = {name: shape for name, shape in target.items() if name in built or not built}
    wrong = wrong_shapes(built, target)
    while wrong:
        tried = []
        for path, value in _options(config, wrong_sizes(wrong)):
            trial = copy.deepcopy(config)
            try:
                _set(trial, path, value)
            except Exception:  # the configuration checks the types of its attributes
                continue
            left = wrong_shapes(_built_shapes(family, trial), target)
            if len(left) < len(wrong):
                tried.append((left, path, value))
        tried.sort(key=lambda each: len(each[0]))
        best = next((left for left, path, value in tried if _changes_nothing(model.config, path, value, is_same)), None)
        if best is None:
            return _store_shapes(model, family, wrong)
        config, wrong = copy.deepcopy(model.config), best
    auto_map = getattr(model.config, "auto_map", None)
    if family is not type(model) and auto_map:  # the modeling file is no longer needed
        del model.config.auto_map
    return ""


def _changes_nothing(config: Any, path: tuple[str, ...], value: Any, is_same: Callable[[], bool]) -> bool:
    """Set an attribute in the configuration of a model; put the old one back if the model then computes otherwise."""
    owner = _owner(config, path)
    before = dict(vars(owner))
    _set(config, path, value)
    try:
        same = is_same()
    except Exception:  # whatever the model raises for shapes that do not fit
        same = False
    if not same:
        vars(owner).update(before)
    return same


def _store_shapes(model: Any, family: Any, wrong: Wrong) -> str:
    """Add the shapes to the configuration that its other attributes do not say, and the widths of modules."""
    pairs = wrong_sizes(wrong)
    names = ", ".join(map(str, sorted({new for _, new in pairs})[:8]))
    modules = dict(_built(family, model.config).named_modules())
    numbers = {}
    for name, module in model.named_modules():
        before = vars(modules[name]) if name in modules else {}
        integers = {key: now for key, now in vars(module).items() if type(now) is type(before.get(key)) is int}
        if found := {key: now for key, now in integers.items() if (before[key], now) in pairs}:
            numbers[name] = found
    setattr(model.config, SHAPES, {name: list(right) for name, (_, right) in wrong.items()})
    setattr(model.config, NUMBERS, numbers)
    return f"no configuration of {family.__name__} gives the new numbers ({names})"


def _options(config: Any, pairs: Mapping[tuple[int, int], None]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield attributes that may hold a width, each with a new value; None stands for a width derived from another."""
    for path, value in _attributes(config):
        for old, new in pairs:
            if (type(value) is int and value == old) or value is None:
                yield path, new
            elif isinstance(value, list | tuple) and old in value:
                yield path, type(value)(new if each == old else each for each in value)


def _attributes(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in vars(config).items():
        if _is_configuration(value):
            yield from _attributes(value, (*path, name))
        elif not name.startswith("_") and not name.endswith("_token_id"):
            yield (*path, name), value


def _is_configuration(value: object) -> bool:
    from transformers import PretrainedConfig

    return isinstance(value, PretrainedConfig)


def _owner(config: Any, path: tuple[str, ...]) -> Any:
    return functools.reduce(getattr, path[:-1], config)


def _set(config: Any, path: tuple[str, ...], value: Any) -> None:
    setattr(_owner(config, path), path[-1], value)


def _built_shapes(family: Any, config: Any) -> Shapes:
    """Return the shapes of a model that is built from a configuration; none if it cannot be built."""
    try:
        return shapes_of(_built(family, config))
    except Exception:  # whatever the family raises for values that contradict each other
        return {}


def _built(family: Any, config: Any) -> nn.Module:
    from transformers.initialization import no_init_weights

    with torch.device("meta"), no_init_weights():
        built: nn.Module = family(copy.deepcopy(config))
    return built


def shapes_of(model: nn.Module) -> Shapes:
    """Return the shape of each parameter and buffer, by name."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def wrong_shapes(built: Shapes, target: Shapes) -> Wrong:
    """Return the tensors that have another shape in a model as built."""
    return {name: (built.get(name, ()), shape) for name, shape in target.items() if built.get(name) != shape}


def wrong_sizes(wrong: Wrong) -> dict[tuple[int, int], None]:
    """Return the old and new sizes of dimensions that do not fit."""
    shapes = [pair for pair in wrong.values() if len(pair[0]) == len(pair[1])]
    return dict.fromkeys((b, a) for before, after in shapes for b, a in zip(before, after, strict=True) if b != a)
