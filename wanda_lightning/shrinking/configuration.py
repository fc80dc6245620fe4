"""Find the settings that describe a model after hidden units were taken out of it.

No table of families says which setting holds a width. Each one that may hold it is changed, and the model is built on
the meta device: a setting is right if more shapes fit. For a model of timm, the settings are the arguments of its
class. For a model of transformers, they are the attributes of its configuration. If none give the shapes, the shapes
themselves are added to it, and a modeling file reads them: transformers loads a class of its own for a folder with such
a file if `trust_remote_code=True`.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wanda_lightning.common.errors import UserError
from wanda_lightning.models.hidden_units import replace_attributes

# Attributes of a configuration: the shapes of tensors and the widths of modules that no other attribute says.
SHAPES, NUMBERS = "shrunk_shapes", "shrunk_numbers"
_FAMILY = "shrunk_family"  # attribute of a class in a modeling file: the class of transformers that it is made from

_Settings = tuple[tuple[Any, Any], ...]  # names and values, set one after the other
_Wrong = Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]  # by tensor: the shape as built, and the right one


def fit_settings(
    model: nn.Module,
    built_with: Callable[[_Settings], nn.Module],
    options: Callable[[_Settings, Iterable[tuple[int, int]]], Iterable[tuple[Any, Any]]],
    is_right: Callable[[_Settings], bool] = lambda settings: True,
) -> tuple[_Settings, _Wrong]:
    """Change one setting after another, each time the one with which most tensors get the shapes of a model.

    `options` returns settings to try next, given those so far, and the old and new sizes of what they leave wrong.
    `is_right` decides whether settings that give more shapes may be taken. Returned are the settings, and the tensors
    that still have other shapes.
    """
    names = _shapes_of(built_with(())).keys()
    target = {name: shape for name, shape in _shapes_of(model).items() if name in names}

    def wrong_with(settings: _Settings) -> _Wrong:
        built = _shapes_of(built_with(settings))
        return {name: (built.get(name, ()), shape) for name, shape in target.items() if built.get(name) != shape}

    settings: _Settings = ()
    wrong = wrong_with(settings)
    while wrong:
        better: list[tuple[_Settings, _Wrong]] = []
        for option in options(settings, wrong_sizes(wrong)):
            more = (*settings, option)
            try:
                left = wrong_with(more)
            except Exception:  # whatever a family raises for values that contradict each other
                continue
            if not left and is_right(more):
                return more, left
            if 0 < len(left) < len(wrong):
                better.append((more, left))
        better.sort(key=lambda each: len(each[1]))
        best = next((each for each in better if is_right(each[0])), None)
        if best is None:
            break
        settings, wrong = best
    return settings, wrong


def _shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def wrong_sizes(wrong: _Wrong) -> dict[tuple[int, int], None]:
    """Return the old and new sizes of dimensions that do not fit."""
    shapes = [pair for pair in wrong.values() if len(pair[0]) == len(pair[1])]
    return dict.fromkeys((b, a) for before, after in shapes for b, a in zip(before, after, strict=True) if b != a)


def fit_configuration(model: nn.Module, is_same: Callable[[], bool] = lambda: True) -> tuple[str, Callable[[], None]]:
    """Adapt the configuration of each model of transformers that a model is or contains.

    The model gets a configuration of its own, since another model may have been built from the old one. An attribute
    that has a width by chance stays: `is_same` returns whether the model still computes the same.

    Returned are why no ordinary configuration describes a model, empty if one does; and a function that undoes it.
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


def _fit(model: Any, is_same: Callable[[], bool]) -> str:
    """Change the configuration of a model so that it gives the shapes of the model."""
    family, config = _family_of(model), model.config
    for name in (SHAPES, NUMBERS):
        vars(config).pop(name, None)
    before = copy.deepcopy(config)

    def built_with(settings: _Settings) -> nn.Module:
        from transformers.initialization import no_init_weights

        with torch.device("meta"), no_init_weights():
            built: nn.Module = family(_changed(copy.deepcopy(before), settings))
        return built

    def options(settings: _Settings, sizes: Iterable[tuple[int, int]]) -> Iterator[tuple[tuple[str, ...], Any]]:
        """Yield attributes that may hold a width; None stands for a width derived from another."""
        for path, value in _attributes(_changed(copy.deepcopy(before), settings)):
            for old, new in sizes:
                if (type(value) is int and value == old) or value is None:
                    yield path, new
                elif isinstance(value, list | tuple) and old in value:
                    yield path, type(value)(new if each == old else each for each in value)

    def changes_nothing(settings: _Settings) -> bool:
        """Set the last attribute in the model's configuration; put it back if the model then computes otherwise."""
        owner = _owner(config, settings[-1][0])
        old = dict(vars(owner))
        _changed(config, settings[-1:])
        try:
            same = is_same()
        except Exception:  # whatever the model raises for shapes that do not fit
            same = False
        if not same:
            vars(owner).update(old)
        return same

    settings, wrong = fit_settings(model, built_with, options, changes_nothing)
    if wrong:
        return _store_shapes(model, built_with(settings), wrong)
    if family is not type(model) and getattr(config, "auto_map", None):  # the modeling file is no longer needed
        del config.auto_map
    return ""


def _store_shapes(model: Any, built: nn.Module, wrong: _Wrong) -> str:
    """Add the shapes to the configuration that its other attributes do not say, and the widths of modules."""
    sizes, modules, numbers = wrong_sizes(wrong), dict(built.named_modules()), {}
    for name, module in model.named_modules():
        before = vars(modules[name]) if name in modules else {}
        integers = {key: now for key, now in vars(module).items() if type(now) is type(before.get(key)) is int}
        if found := {key: now for key, now in integers.items() if (before[key], now) in sizes}:
            numbers[name] = found
    setattr(model.config, SHAPES, {name: list(right) for name, (_, right) in wrong.items()})
    setattr(model.config, NUMBERS, numbers)
    names = ", ".join(map(str, sorted({new for _, new in sizes})[:8]))
    return f"no configuration of {_family_of(model).__name__} gives the new numbers ({names})"


def _family_of(model: Any) -> Any:
    """Return the class of a model, or the one from which a modeling file has made it."""
    return getattr(type(model), _FAMILY, type(model))


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


def _changed(config: Any, settings: _Settings) -> Any:
    for path, value in settings:
        setattr(_owner(config, path), path[-1], value)
    return config


_NAME = "modeling_shrunk"
_TEMPLATE = '''\
"""{family} with hidden units taken out: the configuration has the shapes that differ. Written by wanda-lightning."""

import torch
from torch import nn
from {module} import {family} as Family


class {family}(Family):
    """{family} with widths of its own in some layers."""

    shrunk_family = Family

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        for name, shape in config.shrunk_shapes.items():
            place, _, name = name.rpartition(".")
            module = self.get_submodule(place)
            old = getattr(module, name)
            new = torch.zeros(shape, dtype=old.dtype, device=old.device)
            setattr(module, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
        for place, widths in config.shrunk_numbers.items():
            for name, width in widths.items():
                setattr(self.get_submodule(place), name, width)

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
    family = _family_of(model)
    if not family.__module__.startswith("transformers."):
        raise UserError(
            f"The model has widths that no configuration of {family.__name__} gives, and a modeling file can be "
            f"written for classes of transformers only, but this one is from {family.__module__}. Use the model in "
            "memory, export it (torch.export, ONNX), or prune with allocation='uniform'."
        )
    text = _TEMPLATE.format(family=family.__name__, module=family.__module__)
    config.auto_map = dict.fromkeys(auto_classes(family, config), f"{_NAME}.{family.__name__}")
    (folder / f"{_NAME}.py").write_text(text, encoding="utf-8")


def auto_classes(family: Any, config: Any) -> list[str]:
    """Return the names of the classes, such as AutoModelForCausalLM, that load a class of transformers."""
    from transformers.models.auto import modeling_auto

    found = []
    for name, auto in vars(modeling_auto).items():
        if name.startswith("AutoModel") and getattr(auto, "_model_mapping", None) is not None:
            loaded = auto._model_mapping.get(type(config), ())
            if family in (loaded if isinstance(loaded, list | tuple) else [loaded]):
                found.append(name)
    return found


# ---- timm


def fitting_arguments(model: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments with which timm builds a model with the shapes of this one.

    Each number among the arguments of the model's class, such as `mlp_ratio`, is scaled as the widths were. `arguments`
    are those of `timm.create_model` beside the name. Raises a ValueError that names layers if none give the shapes.
    """

    def options(found: Iterable[tuple[Any, Any]], sizes: Iterable[tuple[int, int]]) -> Iterator[tuple[str, Any]]:
        """Yield arguments of which one number, or all numbers in a list, are scaled."""
        pairs = sorted(sizes)
        # A width is often int(channels * ratio): half a unit more protects it against rounding.
        ratios = dict.fromkeys((after + more) / before for more in (0, 0.5) for before, after in pairs)
        for name, value in _build(model, {**arguments, **dict(found)})[1].items():
            for ratio in [*ratios, *(1 / ratio for ratio in ratios)]:
                scaled = _scaled(value, ratio)
                if scaled is not None and scaled != value:
                    yield name, scaled

    try:
        _build(model, arguments)
    except Exception:  # timm cannot build it without its shapes, either: nothing is known about it
        return dict(arguments)
    found, wrong = fit_settings(model, lambda more: _build(model, {**arguments, **dict(more)})[0], options)
    if wrong:
        shown = ", ".join(f"{name} {list(new)} instead of {list(old)}" for name, (old, new) in [*wrong.items()][:3])
        raise UserError(
            f"save_pretrained writes a folder that timm.create_model can build, but no arguments of "
            f"{type(model).__name__} give the widths of this model: {shown}{', ...' if len(wrong) > 3 else ''}. "
            "Save it with its zeros, or keep the module in memory and export it (torch.export, ONNX), which takes "
            "any shape."
        )
    return {**arguments, **dict(found)}


def _scaled(value: Any, ratio: float) -> Any:
    if isinstance(value, list | tuple) and value:
        scaled = [_scaled(each, ratio) for each in value]
        return None if None in scaled else scaled
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    number = value * ratio
    return round(number) if isinstance(value, int) and abs(number - round(number)) < 1e-6 else number


def _build(model: Any, arguments: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """Build a model on the meta device; return it, and all arguments that its class got, with defaults."""
    import timm

    more = {**getattr(model, "_model_args", {}), "num_classes": model.num_classes, **arguments}
    settings: dict[str, Any] = {}
    family: Any = type(model)
    original = family.__init__

    def recording(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        bound = inspect.signature(original).bind(self, *args, **kwargs)
        bound.apply_defaults()
        settings.update(bound.arguments)
        original(self, *args, **kwargs)

    try:
        family.__init__ = recording
        with torch.device("meta"):
            built = timm.create_model(model.pretrained_cfg["architecture"], **more)
    finally:
        family.__init__ = original
    settings.pop("self", None)
    settings |= settings.pop("kwargs", {})
    return built, settings
