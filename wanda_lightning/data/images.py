"""Labelled images as the model wants them: the transforms come from the model's own timm configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from wanda_lightning.checks import check_at_least, check_positive
from wanda_lightning.core.name_patterns import did_you_mean
from wanda_lightning.data.hub import silence_worker_advice
from wanda_lightning.data.image_sources import Source, check_source, open_source

_IN_MEMORY_SIDE = 96  # digits up to this side are kept as tensors, at most 200 MB


# ---------------------------------------------------------------------------------------------------- preprocessing


@dataclass(frozen=True)
class Preprocessing:
    """What a model expects of an image, in the terms of `timm.data.create_transform`.

    Attributes:
        input_size: Channels (1 for gray, 3 for RGB), height, width.
        mean: Of each channel, for pixels in [0, 1].
        std: Likewise.
        interpolation: How images are resized.
        crop_pct: The part of the side that is kept when an image is cropped for evaluation.
        crop_mode: center (of the shorter side's square), squash or border.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str

    def transform(self, is_training: bool) -> Callable[[Any], Tensor]:
        """From a PIL image of the right channels to a normalised tensor of `input_size`; for training, at random."""
        from timm.data import create_transform

        return create_transform(**asdict(self), is_training=is_training)


def resolve_preprocessing(model: str | nn.Module, image_size: int | None = None) -> Preprocessing:
    """Read from a timm model, or a name that timm knows, how its images are prepared.

    timm's configuration describes the pretrained weights. Where the model was built otherwise, the model counts: the
    channels of its first convolution (one channel gets the average mean and std) and the size of its patch embedding.

    Args:
        model: A timm model, a module that has one as `.model`, or a name.
        image_size: Another side than the model's.

    Raises:
        ValueError: If it is not a model of timm's, or one for neither gray nor RGB images.
    """
    import timm
    from timm.data import resolve_data_config

    if isinstance(model, str):
        name = model.removeprefix("timm:")
        if not timm.is_model(name.partition(".")[0]):
            raise ValueError(
                f"The images are prepared as a timm model wants them, but timm knows no {name!r}."
                f"{did_you_mean(name, timm.list_models())} Leave model out to take the one that is trained or pruned."
            )
        config = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
        channels, size = config["input_size"][0], config["input_size"][1:]
    else:
        inner: Any = model if hasattr(model, "pretrained_cfg") else getattr(model, "model", None)
        if not hasattr(inner, "pretrained_cfg"):
            raise ValueError(
                "The images are prepared as a timm model wants them, but neither "
                f"{type(model).__name__} nor its .model has timm's pretrained_cfg. Name a similar one with model=."
            )
        config = resolve_data_config(model=inner)
        channels = next((m.in_channels for m in inner.modules() if isinstance(m, nn.Conv2d)), config["input_size"][0])
        size = getattr(getattr(inner, "patch_embed", None), "img_size", None) or config["input_size"][1:]
    if channels != 1 and channels % 3:  # space-to-depth stems see a multiple of 3
        raise ValueError(f"Images have 1 or 3 channels, but {type(model).__name__} wants {channels}.")
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


# ------------------------------------------------------------------------------------------------- the data module


class _Images(Dataset[tuple[Tensor, int]]):
    def __init__(self, samples: Sequence[tuple[Any, int]], preprocessing: Preprocessing, is_training: bool) -> None:
        self.samples = samples
        self.mode = "L" if preprocessing.input_size[0] == 1 else "RGB"
        self.transform = preprocessing.transform(is_training)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.samples[index]
        return self.transform(image.convert(self.mode)), label


def _stacked(dataset: _Images) -> TensorDataset:
    images, labels = zip(*(dataset[i] for i in range(len(dataset))), strict=True)
    return TensorDataset(torch.stack(images), torch.tensor(labels))


class ImageDataModule(L.LightningDataModule):
    """Labelled images, prepared as the timm model at hand wants them: its size, channels, mean and std.

    A batch is `(images, labels)`: float32 of shape (batch, channels, height, width), int64 of shape (batch,).
    Calibration has training images, as in Sun et al. 2024 (4096 of ImageNet): the first `num_samples` of a seeded
    permutation, all if there are fewer, prepared as for evaluation. Training has timm's augmentations for the model,
    from the global generators that `seed_everything` sets. Digits are not augmented, since mirrored digits are no
    digits, and are resized whole.

    Without a training part (a folder of classes, a hub data set with one split) calibration uses the evaluation images,
    and there is nothing to train on.

    Args:
        data: digits (needs no network), cifar10, cifar100, a folder DIR/train/CLASS with DIR/val/CLASS or DIR/CLASS, a
            folder of Parquet files, or the id of a hub data set with one Image and one ClassLabel column.
        model: The timm model, a module that has it as `.model`, or a name; by default the one that the trainer runs.
        batch_size: Images in a batch.
        num_samples: Images to calibrate on.
        num_workers: Processes that decode images; digits up to 96 pixels wide are kept in memory and need none.
        seed: Draws the calibration images and shuffles for training.
        cache_dir: Where downloads from the hub are kept.
        image_size: Another side than the model's. A convolutional model takes any, and its configuration gives the one
            of the pretrained weights, usually 224.

    Raises:
        ValueError: For a number out of range, an unknown source, a folder or table that is not as it should be, more
            classes than the model has, or a model whose transforms are not known.
        FileNotFoundError: For a path that does not exist.
        OSError: If the hub is needed and cannot be reached.
    """

    def __init__(
        self,
        data: str = "digits",
        model: str | nn.Module | None = None,
        batch_size: int = 64,
        num_samples: int = 4096,
        num_workers: int = 0,
        seed: int = 0,
        cache_dir: str | None = None,
        image_size: int | None = None,
    ) -> None:
        super().__init__()
        check_positive(batch_size=batch_size, num_samples=num_samples, image_size=image_size)
        check_at_least(0, num_workers=num_workers)
        check_source(data)
        self.data = data
        self.model = model
        self.batch_size = batch_size
        self.num_samples = num_samples
        self.num_workers = num_workers
        self.seed = seed
        self.cache_dir = cache_dir
        self.image_size = image_size
        self.preprocessing: Preprocessing | None = None
        self._source: Source | None = None
        self._kept: dict[str, TensorDataset] = {}

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes, by label; known after `setup`."""
        return self._opened().class_names

    @property
    def num_classes(self) -> int:
        """How many classes there are; known after `setup`."""
        return len(self.class_names)

    def setup(self, stage: str | None = None) -> None:
        """Open the images and find the transforms, so that nothing is trained or pruned on data that does not fit."""
        model = self.model if self.model is not None else getattr(self.trainer, "lightning_module", None)
        if model is None:
            raise ValueError(
                "The images are prepared as a timm model wants them, but there is none: give model=, or let a Trainer "
                "run its own."
            )
        preprocessing = resolve_preprocessing(model, self.image_size)
        if self.data == "digits":
            preprocessing = replace(preprocessing, interpolation="bicubic", crop_pct=1.0, crop_mode="squash")
        if preprocessing != self.preprocessing:
            self._kept.clear()
        self.preprocessing = preprocessing
        self._source = self._source or open_source(self.data, self.cache_dir)
        outputs = getattr(model, "num_classes", None)
        if isinstance(outputs, int) and 0 < outputs < self.num_classes:
            raise ValueError(
                f"{self.data} has {self.num_classes} classes, but the model tells only {outputs} apart. "
                "Build it with the right num_classes."
            )
        if isinstance(outputs, int) and outputs > self.num_classes:
            rank_zero_warn(
                f"{self.data} has {self.num_classes} classes, but the model tells {outputs} apart: its accuracy means "
                "something only if it was trained on these classes, in this order"
            )

    def _opened(self) -> Source:
        if self._source is None:
            raise RuntimeError("The images are not open yet. Call setup() first; a Trainer does.")
        return self._source

    @property
    def _in_memory(self) -> bool:
        assert self.preprocessing is not None
        return self.data == "digits" and max(self.preprocessing.input_size) <= _IN_MEMORY_SIDE

    def _dataset(self, part: str, augment: bool = False) -> Dataset[Any]:
        source, preprocessing = self._opened(), self.preprocessing
        assert preprocessing is not None
        samples = source.train if part == "train" else source.evaluation
        if samples is None:
            raise ValueError(
                f"{self.data} has nothing to train on, only one part to measure and calibrate on. Use a folder with "
                "DIR/train/CLASS and DIR/val/CLASS."
            )
        images = _Images(samples, preprocessing, augment and self.data != "digits")
        if not self._in_memory:
            return images
        if part not in self._kept:
            self._kept[part] = _stacked(images)
        return self._kept[part]

    def calibration_dataloader(self) -> DataLoader[Any]:
        """The first `num_samples` images of a seeded permutation, prepared as for evaluation."""
        images = self._dataset("evaluation" if self._opened().train is None else "train")
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.seed))  # type: ignore[arg-type]
        return self._loader(Subset(images, order[: self.num_samples].tolist()))

    def train_dataloader(self) -> DataLoader[Any]:
        """The training images, augmented, in an order that the seed gives, another one each epoch."""
        return self._loader(self._dataset("train", augment=True), torch.Generator().manual_seed(self.seed))

    def val_dataloader(self) -> DataLoader[Any]:
        """The evaluation images, in their order."""
        return self._loader(self._dataset("evaluation"))

    def test_dataloader(self) -> DataLoader[Any]:
        """The same as for validation."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Any]:
        """The same as for validation."""
        return self.val_dataloader()

    def _loader(self, dataset: Dataset[Any], shuffle: torch.Generator | None = None) -> DataLoader[Any]:
        if self._in_memory:
            silence_worker_advice()
        workers = 0 if self._in_memory else self.num_workers
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=shuffle is not None,
            generator=shuffle,
            num_workers=workers,
            persistent_workers=workers > 0,
        )
