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
from wanda_lightning.data.hub import load_from_hub

_HUB = {"cifar10": ("uoft-cs/cifar10", "label"), "cifar100": ("uoft-cs/cifar100", "fine_label")}  # id, label column
_NAMES = ("digits", *_HUB)
_ALTERNATIVE = "digits, which needs no network, or a FOLDER with train/CLASS and val/CLASS"
_EVALUATION_SPLITS = ("validation", "val", "test")  # the first one that a hub data set has
_EXPECTED = (
    f"Give {', '.join(_NAMES)}, the id of a hub data set (OWNER/NAME), or a folder with train/CLASS and val/CLASS, or "
    "with classes only."
)


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
            raise UserError(
                f"The image {where} cannot be read ({type(error).__name__}: {one_line(error)}). Remove it, replace it, "
                "or scale it down if it is too large."
            ) from error
        return (image if self.transform is None else self.transform(image)), label


@dataclass(frozen=True)
class Source:
    """Labeled images before any transform; `train` is None if there are none for training.

    Labels are positions in `class_names`, which `sorted_by_name` says are the sorted names of the class folders.
    """

    train: Images | None
    evaluation: Images
    class_names: tuple[str, ...]
    sorted_by_name: bool = False


def check_source(data: str, calibrates: bool = False) -> None:
    """Check the name of a source without reading images or connecting to the hub.

    Raises an error for an unknown name, a path that does not exist, or a folder without class folders; with
    `calibrates`, also for a folder that has `val` but no `train`.
    """
    path = Path(data).expanduser()
    if data == "digits":
        require_extra("demo", "sklearn", purpose="The digits")
    elif data in _NAMES:
        return
    elif path.is_dir():
        if _is_parquet(path):
            return
        train, evaluation = _image_folders(path)
        if calibrates and train is None and evaluation != path:
            raise UserError(
                f"data must have training images to calibrate on, but {data} has only the folder val. To calibrate on "
                f"the evaluation images, give {evaluation}."
            )
    elif path.is_file() or data.startswith(("/", ".", "~")) or path.is_absolute():
        found = "is a file" if path.is_file() else "does not exist"
        raise FileNotFoundError(f"data must be a folder of images, but {data} {found}. {_EXPECTED}")
    elif data.count("/") != 1:
        raise UserError(
            f"data must be a folder or a known data set, but it is {data!r}.{did_you_mean(data, _NAMES)} {_EXPECTED}"
        )


def open_source(data: str, cache_dir: str | None = None, model_classes: Sequence[str] = ()) -> Source:
    """Open a source that `check_source` accepts; images are decoded when they are used.

    If all class folders have names that are among `model_classes`, the model's classes by output, their labels are the
    outputs.
    """
    if data == "digits":
        return _digits()
    if _has_class_folders(data):
        return _from_folder(Path(data).expanduser(), model_classes)
    return _from_splits(_load_splits(data, cache_dir), *_HUB.get(data, (data, None)))


def _load_splits(data: str, cache_dir: str | None = None) -> Mapping[str, Any]:
    """Return the splits of a source without class folders: a hub data set, or a folder of Parquet files."""
    path = Path(data).expanduser()
    name = str(path) if path.is_dir() else _HUB.get(data, (data, None))[0]
    return load_from_hub(name, instead=_ALTERNATIVE, cache_dir=cache_dir)


def download(data: str, cache_dir: str | None = None) -> None:
    """Download a hub data set, or convert Parquet files, into the cache of `datasets`; nothing for other sources."""
    if data != "digits" and not _has_class_folders(data):
        _load_splits(data, cache_dir)


def _has_class_folders(data: str) -> bool:
    path = Path(data).expanduser()
    return data not in _HUB and path.is_dir() and not _is_parquet(path)


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


# ---------------------------------------------------------------------------------------------------------- folders


def _is_parquet(folder: Path) -> bool:
    # The layouts of `Dataset.to_parquet` and of hub clones. rglob would list all files of an ImageNet folder.
    return any(chain(folder.glob("*.parquet"), folder.glob("*/*.parquet")))


def _subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []


def _image_folders(root: Path) -> tuple[Path | None, Path]:
    """Return the folders of training images, or None without a folder `train`, and of evaluation images."""
    found = _subfolders(root)
    train = root / "train" if "train" in found else None
    evaluation = root / "val" if {"train", "val"} & set(found) else root
    for folder in (train, evaluation):
        if folder is not None and not _subfolders(folder):
            files = sum(entry.is_file() for entry in root.iterdir())
            raise UserError(
                f"data must have folders of classes in {folder}, but there are none: {root} has the folders "
                f"{_few(found)} and {files} files. {_EXPECTED}"
            )
    if train is not None and (unknown := sorted({*_subfolders(evaluation)} - {*_subfolders(train)})):
        raise UserError(
            f"data must have training images for each class, but {evaluation} has {len(unknown)} classes that {train} "
            f"does not have: {_few(unknown)}. Rename or remove them."
        )
    return train, evaluation


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more if names else "(none)"


def _from_folder(root: Path, model_classes: Sequence[str]) -> Source:
    train, evaluation = _image_folders(root)
    folders = _subfolders(evaluation if train is None else train)
    by_model = {*folders} <= {*model_classes}
    classes = tuple(model_classes if by_model else folders)
    labels = {name: label for label, name in enumerate(classes)}
    opened = None if train is None else _class_folders(train, labels, allow_empty=False)
    return Source(opened, _class_folders(evaluation, labels, allow_empty=True), classes, sorted_by_name=not by_model)


def _class_folders(folder: Path, labels: Mapping[str, int], allow_empty: bool) -> Images:
    """Open the images of the class folders in a folder; `allow_empty` allows some of them to have none."""
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    present = {name: labels[name] for name in _subfolders(folder)}
    samples = make_dataset(str(folder), present, extensions=IMG_EXTENSIONS, allow_empty=True)
    empty = sorted(present.keys() - {Path(path).relative_to(folder).parts[0] for path, _ in samples})
    if empty and not (allow_empty and samples):
        raise UserError(
            f"data must have images in the class folders of {folder}, but {len(empty)} have none: {_few(empty)}. "
            f"Images end in {', '.join(IMG_EXTENSIONS)}."
        )
    return Images(samples, str(folder))


# ----------------------------------------------------------------------------------------------------------- tables


def _from_splits(splits: Mapping[str, Any], name: str, label: str | None) -> Source:
    evaluation = next((split for split in _EVALUATION_SPLITS if split in splits), None)
    if evaluation is None:
        if len(splits) != 1:
            raise UserError(
                f"{name} must have a split named {', '.join(_EVALUATION_SPLITS)}, but it has {', '.join(splits)}. "
                "Save it as a folder DIR/train/CLASS, DIR/val/CLASS."
            )
        (evaluation,) = splits
    train = splits["train"] if "train" in splits and evaluation != "train" else None
    features = splits[evaluation].features
    columns = find_columns(features, name, label)
    return Source(
        None if train is None else Images(train, name, columns),
        Images(splits[evaluation], name, columns),
        tuple(features[columns[1]].names),
    )


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
