"""`shrunk_model`, with which timm builds and loads a model whose widths no arguments of timm give.

The functions are copied into the file of a saved folder, which must work without this package. So they use no other
names than each other's, `Any`, timm, torch and three names of types.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from wanda_lightning.units.modeling_shrunk import Numbers, Shapes, Tensors, reshape, resized


def shrunk_model(
    shrunk_from: str,
    shrunk_shapes: Shapes,
    shrunk_numbers: Numbers,
    pretrained: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Build the model `shrunk_from` of timm, and give it its shapes and widths; load the weights if `pretrained`.

    timm loads the weights into a model with all units, those that were taken out as zeros. So it can adapt them to
    another image size, number of channels or of classes, and return features, as it does for `shrunk_from`.
    """
    import timm

    shrunk_arguments = {
        "shrunk_from": shrunk_from,
        "shrunk_shapes": shrunk_shapes,
        "shrunk_numbers": shrunk_numbers,
    }
    pretrained_cfg = kwargs.pop("pretrained_cfg", None)
    overlay = kwargs.pop("pretrained_cfg_overlay", None)
    config = timm.models.resolve_pretrained_cfg(shrunk_from, pretrained_cfg, overlay).to_dict()
    # Before 1.0.31, timm does not tell saved arguments from those of the caller; a copy of this file may run there.
    saved = dict(kwargs.get("pretrained_model_args", kwargs))
    for key in shrunk_arguments:
        saved.pop(key, None)
    sizes = dense_shapes(shrunk_from, config, saved)

    source = dict(config)
    if pretrained:
        tensors = read_tensors(config, kwargs.get("cache_dir"))
        add_zero_units(tensors, shrunk_shapes, sizes)
        source.update(source="", state_dict=tensors)
    model = timm.create_model(shrunk_from, pretrained, pretrained_cfg=source, **kwargs)

    take_units(model, sizes, shrunk_shapes, shrunk_numbers)
    if kwargs.get("features_only"):
        channels, *size = config["input_size"]
        size = kwargs.get("img_size", size)
        if isinstance(size, int):
            size = [size, size]
        count_channels(model, torch.zeros(1, kwargs.get("in_chans", channels), *size))
    correct_labels(model, config.get("source"))
    model._model_args = {**getattr(model, "_model_args", {}), **shrunk_arguments}
    return model


def dense_shapes(name: str, config: dict[str, Any], saved: dict[str, Any]) -> Shapes:
    """Return the shapes of all tensors of a model of timm with all units, as saved: never those of its features."""
    import timm

    of_features = ("features_only", "out_indices", "feature_cls")
    arguments = {key: value for key, value in saved.items() if key not in of_features}
    with torch.device("meta"):
        dense = timm.create_model(name, pretrained_cfg=config, **arguments)
    return {key: list(tensor.shape) for key, tensor in dense.state_dict().items()}


def read_tensors(config: dict[str, Any], cache_dir: Any) -> Tensors:
    """Read the file of a model, wherever timm finds it."""
    import timm

    tensors: Tensors = {}

    def collect(state: Tensors, model: nn.Module) -> Tensors:
        # `load_pretrained` loads what a filter returns into the model, but here the file is only read.
        tensors.update(state)
        return {}

    # Without their names, timm does not adapt these two layers to the model.
    unchanged = {**config, "first_conv": None, "classifier": None}
    timm.models.load_pretrained(nn.Identity(), unchanged, filter_fn=collect, cache_dir=cache_dir)
    return tensors


def add_zero_units(tensors: Tensors, shapes: Shapes, sizes: Shapes) -> None:
    """Add the units that were taken out, as zeros, to the tensors; `sizes` are the shapes with all units."""
    for name, shape in shapes.items():
        stored = list(tensors[name].shape)
        if stored != shape:
            raise RuntimeError(f"{name} must have the shape {shape}, but has {stored} in the file.")
        tensors[name] = resized(tensors[name], sizes[name])


def take_units(
    model: nn.Module,
    sizes: Shapes,
    shapes: Shapes,
    numbers: Numbers,
) -> None:
    """Take units out of a model, or of the features of one; `sizes` are the shapes with all units, as saved."""
    # With `features_only`, some layers are missing, and others are called `layer1_0` or `model.layer1.0`.
    named = {**dict(model.named_modules()), **model.state_dict()}
    children = [name for name, _ in model.named_children()]
    prefix = f"{children[0]}." if len(children) == 1 else ""
    new_names: dict[str, str] = {}
    for start in (prefix, ""):
        new_names |= {name.removeprefix(start).replace(".", "_"): name for name in named}

    new_shapes = {}
    for name, shape in shapes.items():
        new_name = new_names.get(name.replace(".", "_"))
        if new_name:
            # Another image size or number of channels may have changed a dimension without units.
            dimensions = zip(shape, sizes[name], named[new_name].shape, strict=True)
            new_shapes[new_name] = [
                size if size != before else now for size, before, now in dimensions
            ]

    new_numbers = {}
    for name, widths in numbers.items():
        new_name = new_names.get(name.replace(".", "_"))
        if new_name is not None:  # the model itself is called ""
            new_numbers[new_name] = widths
    reshape(model, new_shapes, new_numbers)


def count_channels(model: Any, image: torch.Tensor) -> None:
    """Correct the numbers of channels in `feature_info`: units between two convolutions may be a feature."""
    parameter = next(model.parameters())
    with torch.no_grad():
        features = model.eval()(image.to(parameter.device, parameter.dtype))
    model.train()  # as timm creates it

    channels_dim = -1 if str(getattr(model, "output_fmt", "")).endswith("C") else 1
    for index, feature in zip(model.feature_info.out_indices, features, strict=True):
        if feature.ndim == 4:  # tokens of a transformer keep their width
            model.feature_info.info[index]["num_chs"] = feature.shape[channels_dim]


def correct_labels(model: nn.Module, source: Any) -> None:
    """Say in the configuration of a model, and of the model inside features, what it was built and loaded from."""
    for module in model.modules():
        config = getattr(module, "pretrained_cfg", None)
        if isinstance(config, dict):
            config.pop("state_dict", None)
            config |= {"architecture": "shrunk_model", "source": source}


def register_shrunk_model() -> None:
    """Let timm load folders of a `shrunk_model`, but not list it: its name alone does not build a model."""
    import timm

    if not timm.is_model("shrunk_model"):
        timm.models.register_model(shrunk_model)
        # `list_models` leaves out deprecated names only; folders load without their list, too.
        getattr(timm.models._registry, "_deprecated_models", {})["shrunk_model"] = None


# All that a copy in a folder needs.
COPIED_FUNCTIONS = (
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
