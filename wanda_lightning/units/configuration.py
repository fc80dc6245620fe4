"""Find the settings that describe a model after hidden units were taken out of it.

No table of families says which setting holds a width. Each one that may hold it is changed, and the model is built on
the meta device: a setting is right if more shapes fit. For a model of timm, the settings are the arguments of its
class. For a model of transformers, they are the attributes of its configuration. If none give the shapes, the shapes
themselves are saved, and a file in the folder reads them. Transformers loads the class in it if
`trust_remote_code=True`; for timm, it registers `shrunk_model`.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wanda_lightning.common.errors import UserError
from wanda_lightning.units.candidates import replace_attributes

# Attributes of a configuration, and arguments of `shrunk_model`: shapes and widths that no other says.
SHAPES = "shrunk_shapes"
NUMBERS = "shrunk_numbers"
_FAMILY = "shrunk_family"  # attribute of a class in a modeling file: the class of transformers that it is made from

_Settings = tuple[tuple[Any, Any], ...]  # names and values, set one after the other
# By tensor: the shape as built, and the right one.
_Wrong = Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]


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

    def wrong_with(settings: _Settings) -> _Wrong:
        return _wrong_shapes(model, built_with(settings), names)

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


def _wrong_shapes(
    model: nn.Module, built: nn.Module, names: Collection[str] | None = None
) -> _Wrong:
    """Compare the tensors with some names; by default those that both have."""
    shapes = _shapes_of(built)
    right = _shapes_of(model)
    names = right.keys() & (shapes if names is None else names)
    return {
        x: (shapes.get(x, ()), right[x]) for x in right if x in names and shapes.get(x) != right[x]
    }


def wrong_sizes(wrong: _Wrong) -> dict[tuple[int, int], None]:
    """Return the old and new sizes of dimensions that do not fit."""
    shapes = [pair for pair in wrong.values() if len(pair[0]) == len(pair[1])]
    return dict.fromkeys(
        (b, a) for before, after in shapes for b, a in zip(before, after, strict=True) if b != a
    )


def fit_configuration(
    model: nn.Module, is_same: Callable[[], bool] = lambda: True
) -> tuple[str, Callable[[], None]]:
    """Adapt the configuration of each model of transformers that a model is or contains.

    The model gets a configuration of its own, since another model may have been built from the old one. An attribute
    that has a width by chance stays: `is_same` returns whether the model still computes the same.

    Returned are why no ordinary configuration describes a model, empty if one does; and a function that undoes it.
    """
    from transformers import PreTrainedModel

    found = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    inner = {each for outer in found for each in outer.modules() if each is not outer}
    outermost = [each for each in found if each not in inner]
    undo = replace_attributes(
        [attribute for each in outermost for attribute in _own_configuration(each)]
    )
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
    family = _family_of(model)
    config = model.config
    for name in (SHAPES, NUMBERS):
        vars(config).pop(name, None)
    before = copy.deepcopy(config)

    def built_with(settings: _Settings) -> nn.Module:
        from transformers.initialization import no_init_weights

        with torch.device("meta"), no_init_weights():
            built: nn.Module = family(_changed(copy.deepcopy(before), settings))
        return built

    def options(
        settings: _Settings, sizes: Iterable[tuple[int, int]]
    ) -> Iterator[tuple[tuple[str, ...], Any]]:
        return _resized_attributes(_changed(copy.deepcopy(before), settings), sizes)

    def changes_nothing(settings: _Settings) -> bool:
        return _keep_if_same(config, settings[-1], is_same)

    settings, wrong = fit_settings(model, built_with, options, changes_nothing)
    if wrong:
        vars(config).update(_differences(model, built_with(settings)))
        names = ", ".join(map(str, sorted({new for _, new in wrong_sizes(wrong)})[:8]))
        return f"no configuration of {family.__name__} gives the new numbers ({names})"
    # The modeling file is no longer needed.
    if family is not type(model) and getattr(config, "auto_map", None):
        del config.auto_map
    return ""


def _resized_attributes(
    config: Any, sizes: Iterable[tuple[int, int]]
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield attributes that may hold an old size, with the new one; None stands for a width derived from another."""
    for path, value in _attributes(config):
        for old, new in sizes:
            if (type(value) is int and value == old) or value is None:
                yield path, new
            elif isinstance(value, list | tuple) and old in value:
                yield path, type(value)(new if each == old else each for each in value)


def _keep_if_same(config: Any, setting: tuple[Any, Any], is_same: Callable[[], bool]) -> bool:
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


def _differences(model: nn.Module, built: nn.Module) -> dict[str, Any]:
    """Return the shapes of tensors and the widths of modules that a model as built does not have, by their keys."""
    wrong = _wrong_shapes(model, built)
    sizes = wrong_sizes(wrong)
    modules = dict(built.named_modules())
    numbers = {}
    for name, module in model.named_modules():
        before = vars(modules[name]) if name in modules else {}
        integers = {
            key: now
            for key, now in vars(module).items()
            if type(now) is type(before.get(key)) is int
        }
        if found := {key: now for key, now in integers.items() if (before[key], now) in sizes}:
            numbers[name] = found
    return {SHAPES: {name: list(right) for name, (_, right) in wrong.items()}, NUMBERS: numbers}


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


def reshape(
    model: nn.Module, shapes: dict[str, list[int]], numbers: dict[str, dict[str, int]]
) -> None:
    """Give tensors other shapes, with what fits of their entries, and modules other widths."""
    for name, shape in shapes.items():
        place, _, name = name.rpartition(".")
        module = model.get_submodule(place)
        old = getattr(module, name)
        new = resized(old.detach(), shape)
        setattr(
            module,
            name,
            nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new,
        )
    for place, widths in numbers.items():
        for name, width in widths.items():
            setattr(model.get_submodule(place), name, width)


def resized(old: torch.Tensor, shape: list[int]) -> torch.Tensor:
    """Return a tensor of another shape, with what fits of the entries, and zeros."""
    new = torch.zeros(shape, dtype=old.dtype, device=old.device)
    kept = old[tuple(map(slice, shape))]
    new[tuple(map(slice, kept.shape))] = kept
    return new


def _source_of(*functions: Callable[..., Any]) -> str:
    return "\n\n".join(map(inspect.getsource, functions))


_NAME = "modeling_shrunk"
_TEMPLATE = '''\
"""{family} with hidden units taken out: the configuration has the shapes that differ. Written by wanda-lightning."""

import torch
from torch import nn
from {module} import {family} as Family


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
    family = _family_of(model)
    if not family.__module__.startswith("transformers."):
        raise UserError(
            f"The model has widths that no configuration of {family.__name__} gives, and a modeling file can be "
            f"written for classes of transformers only, but this one is from {family.__module__}. Use the model in "
            "memory, export it (torch.export, ONNX), or prune with allocation='uniform'."
        )
    text = _TEMPLATE.format(
        family=family.__name__, module=family.__module__, reshape=_source_of(reshape, resized)
    )
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

_BASE = "shrunk_from"  # the argument of `shrunk_model` that names a model of timm
_TIMM_FILE = '''\
"""Register shrunk_model: any model of timm with hidden units taken out. Written by wanda-lightning.

After `import modeling_shrunk`, timm.create_model("local-dir:FOLDER", pretrained=True) loads the folder of this file.
"""

from typing import Any

import timm
import torch
from torch import nn


{functions}

register_shrunk_model()
'''


def shrunk_model(
    shrunk_from: str,
    shrunk_shapes: dict[str, list[int]],
    shrunk_numbers: dict[str, dict[str, int]],
    pretrained: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Build the model `shrunk_from` of timm, and give it its shapes and widths; load the weights if `pretrained`.

    timm loads the weights into a model with all units, those that were taken out as zeros. So it can adapt them to
    another image size, number of channels or of classes, and return features, as it does for `shrunk_from`.
    """
    import timm

    own = {
        "shrunk_from": shrunk_from,
        "shrunk_shapes": shrunk_shapes,
        "shrunk_numbers": shrunk_numbers,
    }
    chosen = kwargs.pop("pretrained_cfg", None), kwargs.pop("pretrained_cfg_overlay", None)
    config = timm.models.resolve_pretrained_cfg(shrunk_from, *chosen).to_dict()
    # Before 1.0.31, timm does not tell saved arguments from those of the caller; a copy of this file may run there.
    saved = kwargs.get("pretrained_model_args", kwargs)
    sizes = dense_shapes(
        shrunk_from, config, {key: value for key, value in saved.items() if key not in own}
    )

    source = dict(config)
    if pretrained:
        tensors = add_zero_units(
            read_tensors(config, kwargs.get("cache_dir")), shrunk_shapes, sizes
        )
        source |= {"source": "", "state_dict": tensors}
    model = timm.create_model(shrunk_from, pretrained, pretrained_cfg=source, **kwargs)

    take_units(model, sizes, shrunk_shapes, shrunk_numbers)
    if kwargs.get("features_only"):
        size = kwargs.get("img_size", config["input_size"][1:])
        channels = kwargs.get("in_chans", config["input_size"][0])
        count_channels(
            model, torch.zeros(1, channels, *([size, size] if isinstance(size, int) else size))
        )
    correct_labels(model, config.get("source"))
    model._model_args = {**getattr(model, "_model_args", {}), **own}
    return model


def dense_shapes(name: str, config: dict[str, Any], saved: dict[str, Any]) -> dict[str, list[int]]:
    """Return the shapes of all tensors of a model of timm with all units, as saved: never those of its features."""
    import timm

    of_features = ("features_only", "out_indices", "feature_cls")
    arguments = {key: value for key, value in saved.items() if key not in of_features}
    with torch.device("meta"):
        dense = timm.create_model(name, pretrained_cfg=config, **arguments)
    return {key: list(tensor.shape) for key, tensor in dense.state_dict().items()}


def read_tensors(config: dict[str, Any], cache_dir: Any) -> dict[str, torch.Tensor]:
    """Read the file of a model, wherever timm finds it."""
    import timm

    tensors: dict[str, torch.Tensor] = {}

    def take(state: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
        # `load_pretrained` loads what a filter returns into the model, but here the file is only read.
        tensors.update(state)
        return {}

    # Timm adapts these two layers to the model.
    unchanged = {
        **config,
        "first_conv": None,
        "classifier": None,
    }
    timm.models.load_pretrained(nn.Identity(), unchanged, filter_fn=take, cache_dir=cache_dir)
    return tensors


def add_zero_units(
    tensors: dict[str, torch.Tensor], shapes: dict[str, list[int]], sizes: dict[str, list[int]]
) -> dict[str, torch.Tensor]:
    """Return the tensors with all units, those that were taken out as zeros; `sizes` are the shapes with all units."""
    full = {}
    for name, shape in shapes.items():
        if list(tensors[name].shape) != shape:
            raise RuntimeError(
                f"{name} must have the shape {shape}, but has {list(tensors[name].shape)} in the file."
            )
        full[name] = resized(tensors[name], sizes[name])
    return {**tensors, **full}


def correct_labels(model: nn.Module, source: Any) -> None:
    """Say in the configuration of a model, and of the model inside features, what it was built and loaded from."""
    for module in model.modules():
        described = getattr(module, "pretrained_cfg", None)
        if isinstance(described, dict):
            described.pop("state_dict", None)
            described |= {"architecture": "shrunk_model", "source": source}


def take_units(
    model: nn.Module,
    sizes: dict[str, list[int]],
    shapes: dict[str, list[int]],
    numbers: dict[str, dict[str, int]],
) -> None:
    """Reshape a model, or the features of one; `sizes` are the shapes with all units, as saved."""
    # With `features_only`, some parts are missing, and others are called `layer1_0` or `model.layer1.0`.
    here = {**dict(model.named_modules()), **model.state_dict()}
    parts = [name for name, _ in model.named_children()]
    prefix = f"{parts[0]}." if len(parts) == 1 else ""
    places = {name.removeprefix(prefix).replace(".", "_"): name for name in here}
    places |= {name.replace(".", "_"): name for name in here}
    new_shapes = {}
    for name, shape in shapes.items():
        if place := places.get(name.replace(".", "_")):
            # Another image size or number of channels may have changed a dimension without units.
            dimensions = zip(shape, sizes[name], here[place].shape, strict=True)
            new_shapes[place] = [
                size if size != before else now for size, before, now in dimensions
            ]
    flat = {name.replace(".", "_"): widths for name, widths in numbers.items()}
    reshape(
        model, new_shapes, {places[name]: widths for name, widths in flat.items() if name in places}
    )


def count_channels(model: Any, image: torch.Tensor) -> None:
    """Correct the numbers of channels in `feature_info`: units between two convolutions may be a feature."""
    training = model.training
    parameter = next(model.parameters())
    with torch.no_grad():
        features = model.eval()(image.to(parameter.device, parameter.dtype))
    model.train(training)
    features = list(features.values()) if isinstance(features, dict) else features
    is_last = str(getattr(model, "output_fmt", "")).endswith("C")
    for index, feature in zip(model.feature_info.out_indices, features, strict=True):
        if feature.ndim == 4:  # tokens of a transformer keep their width
            model.feature_info.info[index]["num_chs"] = feature.shape[-1 if is_last else 1]


def fit_arguments(model: Any, arguments: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the name and the arguments with which `timm.create_model` builds a model with the shapes of this one.

    Each number among the arguments of the model's class, such as `mlp_ratio`, is scaled as the widths were. If none
    give the shapes, the name is `shrunk_model`, and its arguments are the shapes. `arguments` are those of
    `timm.create_model` beside the name. Raises a ValueError for a model with other modules.
    """
    known = {**getattr(model, "_model_args", {}), "num_classes": model.num_classes, **arguments}
    known = {key: value for key, value in known.items() if key not in (SHAPES, NUMBERS)}
    base = known.pop(_BASE, None)
    name = base or model.pretrained_cfg["architecture"]
    build = functools.partial(_build, type(model), name)

    def options(
        found: Iterable[tuple[Any, Any]], sizes: Iterable[tuple[int, int]]
    ) -> Iterator[tuple[str, Any]]:
        """Yield arguments of which one number, or all numbers in a list, are scaled."""
        pairs = sorted(sizes)
        # A width is often int(channels * ratio): half a unit more protects it against rounding.
        ratios = dict.fromkeys(
            (after + more) / before for more in (0, 0.5) for before, after in pairs
        )
        for key, value in build({**known, **dict(found)})[1].items():
            for ratio in [*ratios, *(1 / ratio for ratio in ratios)]:
                scaled = _scaled(value, ratio)
                if scaled is not None and scaled != value:
                    yield key, scaled

    try:
        built, _ = build(known)
    except Exception:  # timm cannot build it without its shapes, either: nothing is known about it
        if base:
            raise
        return name, dict(arguments)
    sizes = wrong_sizes(_wrong_shapes(model, built))
    uneven = len(sizes) > len({before for before, _ in sizes})  # equal widths became different ones
    if base is None and not uneven:
        found, wrong = fit_settings(model, lambda more: build({**known, **dict(more)})[0], options)
        if not wrong:
            return name, {**arguments, **dict(found)}
    different = _differences(model, built)
    reshape(built, *different.values())
    lines = itertools.zip_longest(
        str(model).splitlines(), str(built).splitlines(), fillvalue="nothing"
    )
    if pair := next((pair for pair in lines if pair[0] != pair[1]), None):
        raise UserError(
            f"save_pretrained writes a folder that timm.create_model can build, but {name} of timm has "
            f"`{pair[1].strip()}` where this model has `{pair[0].strip()}`. Keep the module in memory and export it "
            "(torch.export, ONNX), which takes any model."
        )
    return shrunk_model.__name__, {**arguments, _BASE: name, **different}


def _scaled(value: Any, ratio: float) -> Any:
    if isinstance(value, list | tuple) and value:
        scaled = [_scaled(each, ratio) for each in value]
        return None if None in scaled else scaled
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    number = value * ratio
    return (
        round(number) if isinstance(value, int) and abs(number - round(number)) < 1e-6 else number
    )


def _build(
    family: Any, name: str, arguments: Mapping[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    """Build a model on the meta device; return it, and all arguments that its class got, with defaults."""
    import timm

    settings: dict[str, Any] = {}
    original = family.__init__

    def recording(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        bound = inspect.signature(original).bind(self, *args, **kwargs)
        bound.apply_defaults()
        settings.update(bound.arguments)
        original(self, *args, **kwargs)

    try:
        family.__init__ = recording
        with torch.device("meta"):
            built = timm.create_model(name, **arguments)
    finally:
        family.__init__ = original
    settings.pop("self", None)
    settings |= settings.pop("kwargs", {})
    return built, settings


def register_shrunk_model() -> None:
    """Let timm load folders of a `shrunk_model`, but not list it: its name alone does not build a model."""
    import timm

    if not timm.is_model("shrunk_model"):
        timm.models.register_model(shrunk_model)
        # `list_models` leaves out deprecated names only; folders load without their list, too.
        getattr(timm.models._registry, "_deprecated_models", {})["shrunk_model"] = None


# All that `shrunk_model` calls: the file in a folder must not need this package.
_TIMM_FUNCTIONS = (
    reshape,
    resized,
    shrunk_model,
    dense_shapes,
    read_tensors,
    add_zero_units,
    take_units,
    count_channels,
    correct_labels,
    register_shrunk_model,
)


def save_for_timm(
    model: Any, arguments: Mapping[str, Any], labels: Mapping[str, Any], folder: Path
) -> None:
    """Write a folder that timm loads, with a file of its own if no arguments of timm give the model's shapes.

    `arguments` are those of `timm.create_model` beside the name; `labels` go into the configuration.
    """
    from timm.models import save_for_hf

    name, arguments = fit_arguments(model, arguments)
    config = {"architecture": name, **labels}
    save_for_hf(
        model, str(folder), model_config=config, model_args=arguments, safe_serialization=True
    )
    if name == shrunk_model.__name__:
        text = _TIMM_FILE.format(functions=_source_of(*_TIMM_FUNCTIONS))
        (folder / f"{_NAME}.py").write_text(text, encoding="utf-8")
