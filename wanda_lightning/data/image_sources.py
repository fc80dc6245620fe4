"""The labelled images: their names, where they come from, and which part is for what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from wanda_lightning.core.name_patterns import did_you_mean
from wanda_lightning.data.hub import load_from_hub

_HUB = {"cifar10": ("uoft-cs/cifar10", "label"), "cifar100": ("uoft-cs/cifar100", "fine_label")}  # id, column of labels
_NAMES = ("digits", *_HUB)
_INSTEAD = "digits, which needs no network, or a FOLDER with train/CLASS and val/CLASS"
_EVALUATION_SPLITS = ("validation", "val", "test")  # the first that a hub data set has
_EXPECTED = (
    f"Images are {', '.join(_NAMES)}, the id of a hub data set (OWNER/NAME), or a folder with train/CLASS and "
    "val/CLASS, or with classes only."
)


@dataclass(frozen=True)
class Source:
    """Labelled images before any transform: sequences of (PIL image, label).

    Attributes:
        train: None where there is only one part.
        evaluation: What accuracy is measured on.
        class_names: By label.
    """

    train: Sequence[tuple[Any, int]] | None
    evaluation: Sequence[tuple[Any, int]]
    class_names: tuple[str, ...]


def check_source(data: str) -> None:
    """Refuse what cannot be a source, without reading images or asking the hub.

    Raises:
        ValueError: For an unknown name, or a folder without class folders.
        FileNotFoundError: For a path that does not exist.
    """
    path = Path(data).expanduser()
    if data in _NAMES:
        return
    if path.is_dir():
        if not _is_parquet(path):
            _image_folders(path)
    elif path.is_file() or data.startswith(("/", ".", "~")) or path.is_absolute():
        found = "is a file" if path.is_file() else "does not exist"
        raise FileNotFoundError(f"A folder of images was asked for, but {data} {found}. {_EXPECTED}")
    elif data.count("/") != 1:
        raise ValueError(f"{data!r} is no folder here and no known data set.{did_you_mean(data, _NAMES)} {_EXPECTED}")


def open_source(data: str, cache_dir: str | None = None) -> Source:
    """Open digits, a folder or a hub data set; images are decoded when they are used."""
    path = Path(data).expanduser()
    if data == "digits":
        return _digits()
    if data not in _HUB and path.is_dir() and not _is_parquet(path):
        return _folder(path)
    name, label_column = _HUB.get(data, (data, None))
    splits = load_from_hub(str(path) if path.is_dir() else name, instead=_INSTEAD, cache_dir=cache_dir)
    return _from_splits(splits, name, label_column)


def _digits() -> Source:
    """1,797 scanned digits of 8x8 pixels (`sklearn.datasets.load_digits`), 80/20 by class, whatever the seed."""
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype("uint8")
    samples = [(Image.fromarray(image), int(label)) for image, label in zip(pixels, digits.target, strict=True)]
    train, evaluation = train_test_split(samples, test_size=0.2, random_state=0, stratify=digits.target)
    return Source(train, evaluation, tuple(map(str, range(10))))


def _is_parquet(folder: Path) -> bool:
    # As `Dataset.to_parquet` and clones from the hub have it. Not rglob: it would list the whole of an ImageNet.
    return any(chain(folder.glob("*.parquet"), folder.glob("*/*.parquet")))


def _subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []


def _image_folders(root: Path) -> tuple[Path | None, Path]:
    """The folders of training and evaluation; the first is None where the root holds the classes itself."""
    found = _subfolders(root)
    train, evaluation = (root / "train", root / "val") if {"train", "val"} & set(found) else (None, root)
    for folder in (train, evaluation):
        if folder is not None and not _subfolders(folder):
            files = sum(entry.is_file() for entry in root.iterdir())
            raise ValueError(
                f"Folders of classes were looked for in {folder}, but there are none: {root} has the folders "
                f"{', '.join(found) or '(none)'} and {files} files. {_EXPECTED}"
            )
    if train is not None and _subfolders(train) != _subfolders(evaluation):
        differing = sorted({*_subfolders(train)} ^ {*_subfolders(evaluation)})
        raise ValueError(
            f"{train} and {evaluation} should have the same classes, since labels are their positions, but only one of "
            f"them has {', '.join(differing[:5])}{' ...' if len(differing) > 5 else ''}. Complete or remove these."
        )
    return train, evaluation


def _folder(root: Path) -> Source:
    from torchvision.datasets import ImageFolder

    train, evaluation = _image_folders(root)
    try:
        opened = ImageFolder(str(evaluation))
        return Source(None if train is None else ImageFolder(str(train)), opened, tuple(opened.classes))
    except FileNotFoundError as error:
        raise ValueError(f"Each class of {root} should have images, but that is not so: {error}") from error


class _Columns(Sequence[tuple[Any, int]]):
    """(image, label) of the rows of a table."""

    def __init__(self, table: Any, image: str, label: str) -> None:
        self.table, self.image, self.label = table, image, label

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: Any) -> Any:
        row = self.table[index]
        return row[self.image], row[self.label]


def find_columns(features: Mapping[str, Any], name: str, label: str | None = None) -> tuple[str, str]:
    """The names of the image column and of the label column: the only `Image`, the only `ClassLabel`.

    Raises:
        ValueError: If there is none or more than one and `label` does not decide.
    """
    from datasets import ClassLabel, Image

    images = [key for key, feature in features.items() if isinstance(feature, Image)]
    labels = [key for key, feature in features.items() if isinstance(feature, ClassLabel) and label in (None, key)]
    if len(images) == 1 and len(labels) == 1:
        return images[0], labels[0]
    columns = ", ".join(f"{key} ({type(feature).__name__})" for key, feature in features.items())
    raise ValueError(
        f"{name} should have one column of type Image and one of type ClassLabel, but it has {columns}. "
        "Save it as a folder DIR/train/CLASS, DIR/val/CLASS."
    )


def _from_splits(splits: Mapping[str, Any], name: str, label: str | None) -> Source:
    evaluation = next((split for split in _EVALUATION_SPLITS if split in splits), None)
    if evaluation is None:
        if len(splits) > 1 or not splits:
            raise ValueError(
                f"{name} should have a split named {', '.join(_EVALUATION_SPLITS)}, but it has {', '.join(splits)}. "
                "Save it as a folder DIR/train/CLASS, DIR/val/CLASS."
            )
        (evaluation,) = splits
    train = splits["train"] if "train" in splits and evaluation != "train" else None
    features = splits[evaluation].features
    columns = find_columns(features, name, label)
    return Source(
        None if train is None else _Columns(train, *columns),
        _Columns(splits[evaluation], *columns),
        tuple(features[columns[1]].names),
    )
