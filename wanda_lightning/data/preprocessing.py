"""The image preprocessing and the class names of a timm model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from wanda_lightning.model_sources import timm_name


@dataclass(frozen=True)
class Preprocessing:
    """The preprocessing that a model needs, as arguments of `timm.data.create_transform`.

    Attributes:
        input_size: Channels (1 for gray, 3 for RGB), height, width.
        mean: Mean of each channel, for pixels in [0, 1].
        std: Standard deviation of each channel.
        interpolation: How images are resized.
        crop_pct: Fraction of the side that evaluation crops an image to.
        crop_mode: center (of the square on the shorter side), squash or border.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str

    def transform(self, is_training: bool) -> Callable[[Any], Tensor]:
        """Return the transform of a PIL image to a normalized tensor of `input_size`; for training, it augments.

        The image must already be gray or RGB, as the model needs it.
        """
        from timm.data import create_transform

        return create_transform(**asdict(self), is_training=is_training)


def resolve_preprocessing(model: str | nn.Module, image_size: int | None = None) -> Preprocessing:
    """Return the preprocessing of a timm model.

    timm's configuration describes the pretrained weights, but the model may have been built with other arguments, so
    its first convolution gives the channels (one channel gets the average mean and std), and its patch embedding the
    size.

    Args:
        model: A timm model, a module that has one as `.model`, or the name of one.
        image_size: Height and width in pixels, instead of the model's.

    Raises:
        ValueError: If timm does not know the model, or its images are neither gray nor RGB.
    """
    import timm
    from timm.data import resolve_data_config

    if isinstance(model, str):
        known = timm.get_pretrained_cfg(timm_name(model))
        if known is None:
            raise ValueError(f"model must be a name for which timm has transforms, but it is {model!r}. Leave it out.")
        config = resolve_data_config(pretrained_cfg=known.to_dict())
        channels, size = config["input_size"][0], config["input_size"][1:]
    else:
        inner = _timm_model(model)
        if inner is None:
            raise ValueError(
                f"model must be a timm model, whose pretrained_cfg defines the transforms of its images, but neither "
                f"{type(model).__name__} nor its .model has one. Name a similar timm model with model=."
            )
        config = resolve_data_config(model=inner)
        channels = next((m.in_channels for m in inner.modules() if isinstance(m, nn.Conv2d)), config["input_size"][0])
        size = getattr(getattr(inner, "patch_embed", None), "img_size", None) or config["input_size"][1:]
    if channels != 1 and channels % 3:  # space-to-depth stems read a multiple of 3
        raise ValueError(f"model must read 1 or 3 channels, but {type(model).__name__} reads {channels}.")
    height, width = (image_size, image_size) if image_size else size
    mean, std = tuple(config["mean"]), tuple(config["std"])
    if channels == 1:
        mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
    return Preprocessing(
        (1 if channels == 1 else 3, height, width),
        mean,
        std,
        config["interpolation"],
        config["crop_pct"],
        config["crop_mode"],
    )


def _timm_model(model: nn.Module) -> Any:
    """Return the timm model, which may be the `.model` of a module, or None."""
    inner = model if hasattr(model, "pretrained_cfg") else getattr(model, "model", None)
    return inner if hasattr(inner, "pretrained_cfg") else None


def class_names_of(model: str | nn.Module) -> tuple[str, ...]:
    """Return the class names of a timm model, by output, or () if they are not known.

    They come from the configuration of the model, or from ImageNet if the number of outputs matches.
    """
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
