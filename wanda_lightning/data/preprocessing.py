"""The image preprocessing and the class names of a timm model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from wanda_lightning.common.errors import UserError
from wanda_lightning.common.model_source import timm_name


def resolve_preprocessing(model: str | nn.Module, image_size: int | None = None) -> dict[str, Any]:
    """Return the preprocessing of a timm model, as arguments of `timm.data.create_transform`.

    timm's configuration describes the pretrained weights, but the model may have been built with other arguments, so
    its first convolution gives the channels (one channel gets the average mean and std), and its patch embedding the
    size, unless `image_size` is given. `input_size` is (channels, height, width), with 1 channel for gray images and 3
    for RGB. The model may be a name, a timm model, or a module that has one as `.model`.
    """
    import timm
    from timm.data import resolve_data_config

    if isinstance(model, str):
        known = timm.get_pretrained_cfg(timm_name(model))
        if known is None:
            raise UserError(f"model must be a name for which timm has transforms, but it is {model!r}. Leave it out.")
        config = resolve_data_config(pretrained_cfg=known.to_dict())
        channels, *size = config["input_size"]
    else:
        inner = _timm_model(model)
        if inner is None:
            raise UserError(
                f"model must be a timm model, whose pretrained_cfg defines the transforms of its images, but neither "
                f"{type(model).__name__} nor its .model has one. Name a similar timm model with model=."
            )
        config = resolve_data_config(model=inner)
        channels, *size = config["input_size"]
        channels = next((m.in_channels for m in inner.modules() if isinstance(m, nn.Conv2d)), channels)
        size = getattr(getattr(inner, "patch_embed", None), "img_size", None) or size
    if channels != 1 and channels % 3:  # space-to-depth stems read a multiple of 3
        raise UserError(f"model must read 1 or 3 channels, but {type(model).__name__} reads {channels}.")
    if image_size:
        size = (image_size, image_size)
    if channels == 1:
        config |= {name: (sum(config[name]) / len(config[name]),) for name in ("mean", "std")}
    return config | {"input_size": (1 if channels == 1 else 3, *size)}


def _timm_model(model: nn.Module) -> Any:
    """Return the timm model, which may be the `.model` of a module, or None."""
    inner = model if hasattr(model, "pretrained_cfg") else getattr(model, "model", None)
    return inner if hasattr(inner, "pretrained_cfg") else None


def class_names_of(model: str | nn.Module) -> tuple[str, ...]:
    """Return the class names of a timm model by output, its own or those of ImageNet if the number matches, or ()."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    inner = None if isinstance(model, str) else _timm_model(model)
    if inner is None:
        return ()
    names = inner.pretrained_cfg.get("label_names") or ()
    if isinstance(names, Mapping):
        names = [names.get(label, names.get(str(label))) for label in range(len(names))]
    if names and len(names) == inner.num_classes and None not in names:
        return tuple(names)
    subset = infer_imagenet_subset(inner)
    return tuple(ImageNetInfo(subset).label_names()) if subset else ()
