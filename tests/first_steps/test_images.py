"""A folder of photos with 300 classes."""

from pathlib import Path

import lightning as L
import pytest
import timm
import torch
from PIL import Image

from wanda_lightning import ImageClassifierModule, ImageDataModule, PruningCallback, UserError


@pytest.fixture
def module():
    """A classifier of images of 224 pixels."""
    sizes = {"depths": (1, 1, 1, 1), "dims": (8, 16, 32, 64)}
    return ImageClassifierModule("convnext_atto", False, num_classes=300, model_kwargs=sizes)


@pytest.fixture
def photos():
    """A folder of classes, whose images differ in size."""
    noise = torch.randint(256, (120, 160, 4), dtype=torch.uint8).numpy()
    for number in range(300):
        folder = Path(f"my photos/class {number}")
        folder.mkdir(parents=True)
        photo = Image.fromarray(noise[: 64 + number % 50])
        photo.convert("RGB").save(folder / "a photo.jpg")
    return Path("my photos")


def test_300_classes(module, photos):
    data = ImageDataModule(photos, module)
    pruning = PruningCallback(0.5, method="balanced", num_samples=64)
    (results,) = L.Trainer(callbacks=[pruning]).validate(module, data)
    assert results["val_accuracy"] < 0.1
    module.save_pretrained("out/my model")
    timm.create_model("local-dir:out/my model", pretrained=True)


def test_a_broken_photo_is_named(module, photos):
    (photos / "class 7" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 and no image")
    with pytest.raises(UserError, match=r"class 7.broken\.jpg"):
        L.Trainer().validate(module, ImageDataModule(photos, module))
