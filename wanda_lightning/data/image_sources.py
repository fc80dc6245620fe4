"""Open labeled images from digits or a folder, and split them for training and evaluation."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from wanda_lightning.common.checks import require_extra
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.wording import one_line


@dataclass(frozen=True)
class Images(Sequence[tuple[Any, int]]):
    """A sequence of (image, label). An image that cannot be read raises a ValueError that names it.

    A sample has a PIL image or its path, and a label; the transform gets PIL images.
    """

    samples: Sequence[Any]
    transform: Any = None  # a function of an image

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: Any) -> Any:
        from torchvision.datasets.folder import pil_loader

        image, label = self.samples[index]
        try:
            if isinstance(image, str):
                image = pil_loader(image)
        except Exception as error:  # each image format raises its own classes
            raise UserError(
                f"The image {image} cannot be read: {type(error).__name__}: {one_line(error)}"
            ) from error
        if self.transform:
            image = self.transform(image)
        return image, label


class ImageSource(NamedTuple):
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
    """Raise an error for an unknown name or a path that does not exist, without reading anything."""
    if data == "digits":
        require_extra("demo", "sklearn", purpose="The digits")
    elif not os.path.isdir(os.path.expanduser(data)):
        found = f"it is {data!r:.80}" if data else "it is missing"
        raise UserError(
            "data must be digits, or an existing folder with train/CLASS and val/CLASS, or with classes only, but "
            f"{found}."
        )


def open_source(data: str, model_classes: Sequence[str] = ()) -> ImageSource:
    """Open a source that `check_source` accepts; images are decoded when they are used.

    If all class folders have names that are among `model_classes`, the model's classes by output, their labels are the
    outputs.
    """
    return _digits() if data == "digits" else _from_folder(Path(data).expanduser(), model_classes)


def _digits() -> ImageSource:
    """Split the 1,797 scans of `sklearn.datasets.load_digits` (8x8 pixels): always the same 20 % for evaluation."""
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    scans = load_digits()
    pixels = (scans.images * (255 / 16)).round().astype("uint8")  # from 0 to 16 in the scans
    samples = list(zip(map(Image.fromarray, pixels), map(int, scans.target), strict=True))
    train, evaluation = train_test_split(
        samples, test_size=0.2, random_state=0, stratify=scans.target
    )
    return ImageSource(Images(train), Images(evaluation), tuple("0123456789"))


def _from_folder(root: Path, model_classes: Sequence[str]) -> ImageSource:
    """Find the images in train/CLASS and val/CLASS, in val/CLASS alone, or in CLASS alone."""
    from torchvision.datasets import ImageFolder

    train = None
    if (root / "train").is_dir():
        train = ImageFolder(str(root / "train"))
    is_whole = train is None and not (root / "val").is_dir()
    # allow_empty: the evaluation may lack a class.
    evaluation = ImageFolder(str(root if is_whole else root / "val"), allow_empty=True)
    if not evaluation.samples:
        raise UserError(
            f"data must have images to measure on, but the classes in {evaluation.root} have none."
        )

    folders = (train or evaluation).classes
    named_by_model = {*folders} <= {*model_classes}
    classes = tuple(model_classes if named_by_model else folders)
    unknown = sorted({*evaluation.classes} - {*classes})
    if unknown:
        raise UserError(
            f"data must have training images for each class, but has none in train/{unknown[0]}."
        )

    def labeled(folder: Any) -> Images:
        labels = [classes.index(name) for name in folder.classes]
        return Images([(path, labels[i]) for path, i in folder.samples])

    return ImageSource(
        train=labeled(train) if train else None,
        evaluation=labeled(evaluation),
        class_names=classes,
        sorted_by_name=not named_by_model,
        is_whole=is_whole,
    )
