"""Labeled images, prepared as the timm configuration of the model says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from wanda_lightning.checks import check_at_least, check_positive
from wanda_lightning.data.hub import silence_worker_advice
from wanda_lightning.data.image_sources import Images, Source, check_source, open_source
from wanda_lightning.data.module import DataModule
from wanda_lightning.data.preprocessing import Preprocessing, class_names_of, resolve_preprocessing

_IN_MEMORY_SIDE = 96  # pixels; digits up to this side are kept as tensors, at most 200 MB


class _Images(Dataset[tuple[Tensor, int]]):
    def __init__(self, samples: Images, preprocessing: Preprocessing, is_training: bool) -> None:
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


class ImageDataModule(DataModule):
    """Labeled images, prepared for a timm model: its size, channels, mean and standard deviation.

    A batch is `(images, labels)`: float32 of shape (batch, channels, height, width), int64 of shape (batch,).
    Calibration uses training images, as in Sun et al. 2024 (4096 of ImageNet): the first `num_samples` of a seeded
    permutation, or all if there are fewer, prepared as for evaluation. Training augments them as timm does for the
    model, with the global random generators that `seed_everything` sets. Digits are resized without cropping and not
    augmented, since a mirrored digit is no digit.

    Without training images (a folder of classes, a hub data set with one split) calibration uses the evaluation images,
    and training is refused.

    Labels of class folders are the outputs of the model with the same names, if the model knows its class names and has
    all of the folders; else positions in the sorted names of the class folders. A class may be missing among the
    evaluation images.

    Args:
        data: digits (needs no network), cifar10, cifar100, a folder DIR/train/CLASS with DIR/val/CLASS or DIR/CLASS, a
            folder of Parquet files, or the id of a hub data set with one Image and one ClassLabel column.
        model: The timm model, a module that has it as `.model`, or a name; by default the model that the trainer runs.
        batch_size: Images in a batch.
        num_samples: Images to calibrate on.
        num_workers: Processes that decode images; digits of at most 96 pixels are kept in memory and need none.
        seed: Draws the calibration images and shuffles for training.
        cache_dir: Where downloads from the hub are kept.
        image_size: Height and width in pixels. By default those of the pretrained weights, usually 224; a convolutional
            model takes any.

    Raises:
        ValueError: For a number out of range, an unknown source, a folder or table with other contents, an image that
            cannot be read, more classes than the model has, or a model whose transforms are not known.
        FileNotFoundError: For a path that does not exist.
        OSError: If the hub is needed and cannot be reached.
    """

    def __init__(
        self,
        data: str,
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
        self._model_classes: tuple[str, ...] = ()
        self._kept: dict[str, TensorDataset] = {}

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, by label; known after `setup`."""
        return self._opened().class_names

    @property
    def num_classes(self) -> int:
        """Number of classes; known after `setup`."""
        return len(self.class_names)

    def setup(self, stage: str | None = None) -> None:
        """Open the images and find the transforms, so that nothing is trained or pruned on data that does not fit."""
        model = self.model if self.model is not None else getattr(self.trainer, "lightning_module", None)
        if model is None:
            raise ValueError(
                "model must be given, since no Trainer runs one, and the transforms of the images depend on it. Name a "
                "timm model."
            )
        preprocessing = resolve_preprocessing(model, self.image_size)
        if self.data == "digits":
            preprocessing = replace(preprocessing, interpolation="bicubic", crop_pct=1.0, crop_mode="squash")
        if preprocessing != self.preprocessing:
            self._kept.clear()
        self.preprocessing = preprocessing
        names = class_names_of(model)
        if self._source is None or names != self._model_classes:
            self._source, self._model_classes = open_source(self.data, self.cache_dir, names), names
            self._kept.clear()
        self._check_classes(getattr(model, "num_classes", None), self._source)

    def _check_classes(self, outputs: Any, source: Source) -> None:
        """Refuse more classes than outputs; warn if the classes may not be the outputs."""
        classes = source.class_names
        if not isinstance(outputs, int) or outputs < 1:
            return
        if outputs < len(classes):
            raise ValueError(
                f"data must have at most as many classes as the model, but {self.data} has {len(classes)} classes, and "
                f"the model tells only {outputs} apart. Build the model with num_classes={len(classes)}."
            )
        unnamed = [name for name in classes if name not in self._model_classes]
        misnamed = source.sorted_by_name and len(self._model_classes) == outputs and unnamed
        if outputs > len(classes) or misnamed:
            reason = f", and its classes have other names than {unnamed[0]!r}" if misnamed else ""
            rank_zero_warn(
                f"{self.data} has {len(classes)} classes, but the model tells {outputs} apart{reason}. Class number i, "
                f"counted from {classes[0]!r} = 0, is taken for output i of the model: the accuracy means something "
                "only if the model was trained on these classes in this order."
            )

    def _opened(self) -> Source:
        if self._source is None:
            raise RuntimeError("The images are opened by setup(), but it was not called. Call setup() first.")
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
                f"data must have training images to train on, but {self.data} has evaluation images alone. Use a "
                "folder with DIR/train/CLASS and DIR/val/CLASS."
            )
        images = _Images(samples, preprocessing, augment and self.data != "digits")
        if not self._in_memory:
            return images
        if part not in self._kept:
            self._kept[part] = _stacked(images)
        return self._kept[part]

    def calibration_dataloader(self) -> DataLoader[Any]:
        """Return the first `num_samples` images of a seeded permutation, prepared as for evaluation."""
        images = self._dataset("evaluation" if self._opened().train is None else "train")
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.seed))  # type: ignore[arg-type]
        return self._loader(Subset(images, order[: self.num_samples].tolist()))

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training images, augmented, shuffled by the seed, in another order each epoch."""
        return self._loader(self._dataset("train", augment=True), torch.Generator().manual_seed(self.seed))

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the evaluation images, in their order."""
        return self._loader(self._dataset("evaluation"))

    test_dataloader = predict_dataloader = val_dataloader

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
