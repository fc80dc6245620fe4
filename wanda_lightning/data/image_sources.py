"""Open labeled images from digits, a folder or the hub, and split them for training and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from wanda_lightning.common.checks import require_extra
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.words import did_you_mean, one_line
from wanda_lightning.data.loading import is_hub_id, load

_HUB = {"cifar10": ("uoft-cs/cifar10", "label"), "cifar100": ("uoft-cs/cifar100", "fine_label")}  # id, label column
_NAMES = ("digits", *_HUB)
_EVALUATION_SPLITS = ("validation", "val", "test")  # the first one that a hub data set has


@dataclass(frozen=True)
class Images(Sequence[tuple[Any, int]]):
    """A sequence of (image, label). An image that cannot be read raises a ValueError that names it.

    A sample has a PIL image or its path, and a label, each under one of the `keys`; the transform gets PIL images.
    """

    samples: Any
    name: str
    keys: tuple[Any, Any] = (0, 1)
    transform: Callable[[Any], Any] | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: Any) -> Any:
        from torchvision.datasets.folder import pil_loader

        where = f"in row {index} of {self.name}"
        try:
            sample = self.samples[index]
            image, label = sample[self.keys[0]], sample[self.keys[1]]
            if isinstance(image, str):
                where = image
                image = pil_loader(image)
            image.load()
        except IndexError:
            raise
        except Exception as error:  # each image format raises its own classes
            raise UserError(f"The image {where} cannot be read: {type(error).__name__}: {one_line(error)}") from error
        return (image if self.transform is None else self.transform(image)), label


@dataclass(frozen=True)
class Source:
    """Labeled images before any transform; `train` is None if there are none for training.

    Labels are positions in `class_names`, which `sorted_by_name` says are the sorted names of the class folders. A
    source that `is_whole` is not divided, so calibration takes its evaluation images.
    """

    train: Images | None
    evaluation: Images
    class_names: tuple[str, ...]
    sorted_by_name: bool = False
    is_whole: bool = False

    @property
    def calibration(self) -> Images | None:
        """The images to calibrate on; None if there are none."""
        return self.evaluation if self.is_whole else self.train


def check_source(data: str) -> None:
    """Raise an error for an unknown name or a path that does not exist, without reading or downloading anything."""
    if data == "digits":
        require_extra("demo", "sklearn", purpose="The digits")
    if not data or not (data in _NAMES or Path(data).expanduser().is_dir() or is_hub_id(data)):
        raise UserError(
            f"data must be one of {', '.join(_NAMES)}, the id of a hub data set (OWNER/NAME), or an existing folder "
            f"with train/CLASS and val/CLASS, or with classes only, but it is {data!r}.{did_you_mean(data, _NAMES)}"
        )


def open_source(data: str, cache_dir: str | None = None, model_classes: Sequence[str] = ()) -> Source:
    """Open a source that `check_source` accepts; images are decoded when they are used.

    If all class folders have names that are among `model_classes`, the model's classes by output, their labels are the
    outputs.
    """
    if data == "digits":
        return _digits()
    if (splits := load_splits(data, cache_dir)) is None:
        return _from_folder(Path(data).expanduser(), model_classes)
    return _from_splits(splits, *_HUB.get(data, (data, None)))


def load_splits(data: str, cache_dir: str | None) -> Any:
    """Load a hub data set, or a folder of Parquet files, by split; None for digits and class folders."""
    folder = Path(data).expanduser()
    # The layouts of `Dataset.to_parquet` and of hub clones. rglob would list all files of an ImageNet folder.
    tables = chain(folder.glob("*.parquet"), folder.glob("*/*.parquet"))
    if data == "digits" or (data not in _HUB and folder.is_dir() and not any(tables)):
        return None
    return load(_HUB.get(data, (data, None))[0], cache_dir=cache_dir)


def _digits() -> Source:
    """Split the 1,797 scans of `sklearn.datasets.load_digits` (8x8 pixels): always the same 20 % for evaluation."""
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    scans = load_digits()
    pixels = (scans.images * (255 / 16)).round().astype("uint8")
    samples = [(Image.fromarray(image), int(label)) for image, label in zip(pixels, scans.target, strict=True)]
    train, evaluation = train_test_split(samples, test_size=0.2, random_state=0, stratify=scans.target)
    return Source(Images(train, "digits"), Images(evaluation, "digits"), tuple("0123456789"))


def _from_folder(root: Path, model_classes: Sequence[str]) -> Source:
    from torchvision.datasets import ImageFolder

    train = ImageFolder(str(root / "train")) if (root / "train").is_dir() else None
    is_whole = train is None and not (root / "val").is_dir()
    evaluation = ImageFolder(str(root if is_whole else root / "val"), allow_empty=True)  # it may lack a class
    if not evaluation.samples:
        raise UserError(f"data must have images to measure on, but the classes in {evaluation.root} have none.")
    folders = evaluation.classes if train is None else train.classes
    by_model = {*folders} <= {*model_classes}
    classes = tuple(model_classes if by_model else folders)
    if unknown := sorted({*evaluation.classes} - {*classes}):
        raise UserError(f"data must have training images for each class, but has none in train/{unknown[0]}.")

    def labeled(folder: Any) -> Images:
        labels = [classes.index(name) for name in folder.classes]
        return Images([(path, labels[i]) for path, i in folder.samples], folder.root)

    return Source(None if train is None else labeled(train), labeled(evaluation), classes, not by_model, is_whole)


def _from_splits(splits: Mapping[str, Any], name: str, label: str | None) -> Source:
    names = _EVALUATION_SPLITS if len(splits) > 1 else tuple(splits)
    evaluation = next((split for split in names if split in splits), None)
    if evaluation is None:
        raise UserError(f"{name} must have a split named {', '.join(names)}, but it has {', '.join(splits)}.")
    columns = find_columns(splits[evaluation].features, name, label)
    train = Images(splits["train"], name, columns) if "train" in splits and evaluation != "train" else None
    classes = tuple(splits[evaluation].features[columns[1]].names)
    return Source(train, Images(splits[evaluation], name, columns), classes, is_whole=train is None)


def find_columns(features: Mapping[str, Any], name: str, label: str | None = None) -> tuple[str, str]:
    """Return the names of the only column of type `Image` and of the only `ClassLabel` (`label` if given)."""
    from datasets import ClassLabel, Image

    images = [key for key, feature in features.items() if isinstance(feature, Image)]
    labels = [key for key, feature in features.items() if isinstance(feature, ClassLabel) and label in (None, key)]
    if len(images) == 1 and len(labels) == 1:
        return images[0], labels[0]
    columns = ", ".join(f"{key} ({type(feature).__name__})" for key, feature in features.items())
    raise UserError(
        f"{name} must have one column of type Image and one of type ClassLabel, but it has {columns}. "
        "Save it as a folder DIR/train/CLASS, DIR/val/CLASS."
    )
