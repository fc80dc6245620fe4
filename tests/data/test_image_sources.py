"""Labeled images from digits and folders: their labels, and what is refused."""

import shutil

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from support.data import images_of, opened, paint, vit
from support.refusals import refuses
from torch.testing import assert_close

from wanda_lightning import ImageDataModule

# Models without regard to the images.
pytestmark = pytest.mark.filterwarnings("ignore:.*and the model has .* outputs")


def test_digits_are_split_by_class_into_disjoint_parts():
    data = opened("digits", vit())
    train, train_labels = images_of(data.calibration_dataloader())
    evaluation, labels = images_of(data.val_dataloader())
    assert (len(train), len(evaluation)) == (1437, 360)
    assert (data.num_classes, data.class_names) == (10, tuple("0123456789"))
    counts = np.bincount(load_digits().target)
    assert (np.abs(labels.bincount().numpy() - 0.2 * counts) < 1).all()
    assert torch.equal((train_labels.bincount() + labels.bincount()), torch.tensor(counts))
    again = ImageDataModule("digits", vit(), seed=1)  # the parts do not depend on the seed
    again.setup("fit")
    assert torch.equal(images_of(again.val_dataloader())[0], evaluation)


@pytest.mark.parametrize("in_chans", [1, 3])
def test_a_folder_in_the_manner_of_imagenet(imagenet, in_chans):
    data = opened(str(imagenet), vit(in_chans), batch_size=3, num_samples=5)
    assert data.class_names == ("blue", "green")
    images, labels = images_of(data.val_dataloader())
    assert images.shape == (4, in_chans, 16, 16)
    assert labels.tolist() == [0, 0, 1, 1]
    colours = [[0, 0, 0], [0, 0, 10], [0, 255, 0], [0, 255, 10]]
    if in_chans == 1:  # ITU-R 601
        colours = [[round(0.587 * green + 0.114 * blue)] for _, green, blue in colours]
    expected = torch.tensor(colours)[:, :, None, None] / 255 * 2 - 1
    assert_close(images, expected.expand_as(images), atol=0.01, rtol=0)
    assert images_of(data.calibration_dataloader())[0].shape[0] == 5
    train, labels = images_of(data.train_dataloader())
    assert train.shape == (8, in_chans, 16, 16)
    assert labels.bincount().tolist() == [4, 4]


@pytest.mark.parametrize(
    ("name", "found"),
    [("gone", "'gone'"), ("list.txt", "'list.txt'"), ("", "missing")],
)
def test_what_is_no_folder_is_refused_at_once(tmp_path, monkeypatch, name, found):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.txt").write_text("")
    with refuses(f"an existing folder .* but it is {found}"):
        ImageDataModule(name)


def test_a_class_without_training_images_is_refused(imagenet):
    paint(imagenet / "val" / "red", (0, 0), 1)
    with refuses("training images for each class, but has none in train/red"):
        ImageDataModule(imagenet, vit()).setup("fit")


def test_training_images_are_never_measured_instead(imagenet):
    shutil.rmtree(imagenet / "val")
    with pytest.raises(FileNotFoundError, match="val"):
        ImageDataModule(imagenet, vit()).setup("validate")
    (imagenet / "val" / "blue").mkdir(parents=True)
    with refuses(r"images to measure on, but the classes in .*val have none"):
        ImageDataModule(imagenet, vit()).setup("validate")


def test_evaluation_may_lack_classes(imagenet):
    paint(imagenet / "train" / "azure", (128, 255), 1)
    (imagenet / "val" / "azure").mkdir()
    shutil.rmtree(imagenet / "val" / "blue")
    data = opened(str(imagenet), vit())
    assert data.class_names == ("azure", "blue", "green")
    assert images_of(data.val_dataloader())[1].tolist() == [2, 2]
    assert sorted(images_of(data.train_dataloader())[1].tolist()) == [0] + [1] * 4 + [2] * 4


def test_a_broken_image_is_named(imagenet):
    path = imagenet / "val" / "green" / "1.png"
    path.write_bytes(path.read_bytes()[:60])
    data = opened(str(imagenet), vit())
    with refuses(r"The image .*val/green/1\.png cannot be read: (OSError|SyntaxError)"):
        images_of(data.val_dataloader())
