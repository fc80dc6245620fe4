"""Labeled images as a LightningDataModule, with the preprocessing of the timm model."""

import os
from collections.abc import Mapping
from dataclasses import replace
from operator import methodcaller
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.utils.data import DataLoader, Subset

from wanda_lightning.common.aliases import Kwargs, StrPath
from wanda_lightning.common.checks import SEED, check_at_least, check_values
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.model_source import timm_name
from wanda_lightning.common.wording import quantity
from wanda_lightning.data.image_sources import Images, ImageSource, check_source, open_source
from wanda_lightning.data.loaders import silence_worker_advice, training_loader

Batches = DataLoader[Any]


class ImageDataModule(L.LightningDataModule):
    """Labeled images, resized and normalized for a timm model.

    A batch is `(images, labels)`: float32 of shape (batch, channels, height, width), int64 of shape (batch,).
    Calibration uses training images, as in Sun et al. 2024 (4096 of ImageNet): the first `num_samples` of a seeded
    permutation, or all if there are fewer, preprocessed as for evaluation. Training augments images as timm does for
    the model, with the global random generators that `seed_everything` sets. Digits are resized without cropping and
    not augmented, since a mirrored digit is not a digit.

    A folder of classes has evaluation images alone, on which it also calibrates; with val/CLASS alone, calibration
    raises an error. The label of a class folder is the model's output of the same name if
    the model has class names and they include all folders, else the position in the sorted names of the folders.

    Args:
        data: digits, or a folder with train/CLASS and val/CLASS, with val/CLASS alone or with CLASS alone.
        model: A timm model, a module that has it as `.model`, or a name; by default the model that the Trainer runs.
        batch_size: Number of images in a batch.
        num_samples: Number of calibration images.
        num_workers: Number of processes that decode images.
        seed: Seed of the calibration images and of the shuffling for training.
        image_size: Height and width in pixels. By default those of the pretrained weights, usually 224; a convolutional
            model takes any.

    Raises:
        ValueError: For a number out of range, an unknown source, a folder without images and labels, an image
            that cannot be read, more classes than the model has, or a model whose transforms timm does not know.
        OSError: For a folder without images.
    """

    def __init__(
        self,
        data: StrPath,
        model: str | nn.Module | None = None,
        batch_size: int = 64,
        num_samples: int = 4096,
        num_workers: int = 0,
        seed: int = 0,
        image_size: int | None = None,
    ) -> None:
        super().__init__()
        check_at_least(
            1, batch_size=batch_size, num_samples=num_samples, image_size=image_size or 1
        )
        check_values(SEED, seed=seed)
        check_at_least(0, num_workers=num_workers)
        self.data = os.fspath(data)
        check_source(self.data)
        self.model = model
        self.batch_size = batch_size
        self.num_samples = num_samples
        self.num_workers = num_workers
        self.seed = seed
        self.image_size = image_size
        self.preprocessing: Kwargs = {}
        self._source: ImageSource | None = None
        self._model_classes: tuple[str, ...] = ()

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, by label; available after `setup`."""
        return self._opened.class_names

    @property
    def num_classes(self) -> int:
        """Number of classes; available after `setup`."""
        return len(self.class_names)

    def setup(self, stage: str | None = None) -> None:
        """Open the images, find the transforms, and check that the classes fit the model."""
        model: Any = self.model
        if model is None:
            model = getattr(self.trainer, "lightning_module", None)
        if model is None:
            raise UserError(
                "model must be given, since it decides on the transforms and no Trainer runs a model."
            )
        self.preprocessing = resolve_preprocessing(model, self.image_size)
        if self.data == "digits":
            self.preprocessing |= {
                "interpolation": "bicubic",
                "crop_pct": 1.0,
                "crop_mode": "squash",
            }

        # A large folder takes a while to list, and each stage calls this method.
        names = class_names_of(model)
        if self._source is None or names != self._model_classes:
            self._source = open_source(self.data, names)
            self._model_classes = names
        self._check_classes(getattr(model, "num_classes", None), self._source)

    def _check_classes(self, outputs: Any, source: ImageSource) -> None:
        """Raise an error if the model has too few outputs; warn if its outputs may be other classes."""
        classes = source.class_names
        count = len(classes)
        if not isinstance(outputs, int) or outputs < 1:
            return
        if outputs < count:
            raise UserError(
                f"data must have at most as many classes as the model has outputs, but {self.data} has {count} "
                f"and the model {outputs}. Build the model with num_classes={count}."
            )

        reason = ""
        if source.sorted_by_name and len(self._model_classes) == outputs:
            unnamed = [name for name in classes if name not in self._model_classes]
            reason = f", and its classes have other names than {unnamed[0]!r}"
        if reason or outputs > count:
            rank_zero_warn(
                f"{self.data} has {count} classes, and the model has {outputs} outputs{reason}. Class i, "
                f"counted from {classes[0]!r} = 0, is compared with output i of the model: the accuracy is valid only "
                "if the model was trained on these classes in this order."
            )

    @property
    def _opened(self) -> ImageSource:
        if self._source is None:
            raise UserError("setup() opens the images, but it was not called. Call it first.")
        return self._source

    def _prepare(self, images: Images | None, augment: bool = False) -> Any:
        """Return the images with their transforms: for small digits, as a list of tensors."""
        from timm.data import create_transform
        from torchvision.transforms import Compose

        if images is None:
            raise UserError(
                f"data must have training images, but {self.data} has only evaluation images. To calibrate on these, "
                "give the folder with the classes."
            )

        size = self.preprocessing["input_size"]
        is_digits = self.data == "digits"
        mode = "L" if size[0] == 1 else "RGB"
        transform = create_transform(**self.preprocessing, is_training=augment and not is_digits)
        prepared = replace(images, transform=Compose([methodcaller("convert", mode), transform]))
        if not is_digits:
            return prepared
        silence_worker_advice()
        return list(prepared) if max(size) <= 96 else prepared  # at most 200 MB

    def describe_calibration(self, num_samples: int) -> str:
        """Return the source, the number of images, and the seed that drew them."""
        count = min(num_samples, self.num_samples, len(self._opened.calibration or ()))
        return f"{self.data}, {quantity(count, 'image')}, seed {self.seed}"

    def describe_evaluation(self) -> str:
        """Return the source and its number of images."""
        return f"{self.data}, {quantity(len(self._opened.evaluation), 'image')}"

    def calibration_dataloader(self) -> Batches:
        """Return the first `num_samples` images of a seeded permutation, preprocessed as for evaluation."""
        images = self._prepare(self._opened.calibration)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.seed))
        return self._loader(Subset(images, order[: self.num_samples].tolist()))

    def train_dataloader(self) -> Batches:
        """Return the training images, augmented, and shuffled anew in each epoch."""
        # Without persistent workers: those that outlive an epoch would augment with other random numbers than the new
        # ones of a resumed run.
        images = self._prepare(self._opened.train, augment=True)
        return training_loader(self, images, num_workers=self.num_workers)

    def val_dataloader(self) -> Batches:
        """Return the evaluation images, in their order."""
        return self._loader(self._prepare(self._opened.evaluation))

    test_dataloader = predict_dataloader = val_dataloader

    def _loader(self, dataset: Any) -> Batches:
        return DataLoader(
            dataset,
            self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )


def resolve_preprocessing(model: str | nn.Module, image_size: int | None = None) -> Kwargs:
    """Return the preprocessing of a timm model, as arguments of `timm.data.create_transform`.

    timm's configuration describes the pretrained weights, but the model may have been built with other arguments, so
    its first convolution gives the channels (one channel gets the average mean and std), and its patch embedding the
    size, unless `image_size` is given. `input_size` is (channels, height, width), with 1 channel for gray images and 3
    for RGB. The model may be a name, a timm model, or a module that has one as `.model`.
    """
    import timm
    from timm.data import resolve_data_config

    network: Any = model
    if isinstance(model, str):
        with torch.device("meta"):
            network = timm.create_model(timm_name(model))
    inner = _timm_model(network)
    if inner is None:
        raise UserError(
            f"model must be a timm model, whose pretrained_cfg defines the transforms, but {type(model).__name__} has "
            "none. Name a similar timm model."
        )

    config = resolve_data_config(model=inner)
    channels, *size = config["input_size"]
    for module in inner.modules():
        if isinstance(module, nn.Conv2d):
            channels = module.in_channels
            break
    size = getattr(getattr(inner, "patch_embed", None), "img_size", None) or size
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
    if isinstance(names, Mapping):  # its keys are numbers, as text if they come from JSON
        names = [names.get(label, names.get(str(label))) for label in range(len(names))]
    if names and len(names) == inner.num_classes and None not in names:
        return tuple(names)

    subset = infer_imagenet_subset(inner)
    return tuple(ImageNetInfo(subset).label_names()) if subset else ()
