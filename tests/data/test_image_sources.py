"""Labeled images from digits, folders and tables: their labels, and what is refused."""

import io
import shutil

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from support.data import images_of, paint, vit

from wanda_lightning import ImageDataModule
from wanda_lightning.data.image_sources import _from_splits, find_columns

pytestmark = pytest.mark.filterwarnings("ignore:.*and the model has .* outputs")  # models without regard to the images


def test_digits_are_split_by_class_into_disjoint_parts():
    data = ImageDataModule("digits", vit())
    data.setup("fit")
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
    data = ImageDataModule(str(imagenet), vit(in_chans), batch_size=3, num_samples=5)
    data.setup("fit")
    assert data.class_names == ("blue", "green")
    images, labels = images_of(data.val_dataloader())
    assert images.shape == (4, in_chans, 16, 16)
    assert labels.tolist() == [0, 0, 1, 1]
    colours = [np.array([0, green, blue]) for green in (0, 255) for blue in (0, 10)]
    if in_chans == 1:  # ITU-R 601
        colours = [np.array([round(0.587 * green + 0.114 * blue)]) for _, green, blue in colours]
    expected = torch.tensor(np.stack(colours) / 255 * 2 - 1, dtype=torch.float32)
    torch.testing.assert_close(images, expected[:, :, None, None].expand_as(images), atol=0.01, rtol=0)
    assert images_of(data.calibration_dataloader())[0].shape[0] == 5
    train, labels = images_of(data.train_dataloader())
    assert train.shape == (8, in_chans, 16, 16)
    assert labels.bincount().tolist() == [4, 4]


@pytest.mark.parametrize("splits", [("train", "validation", "test"), ("train",)])
def test_columns_of_a_hub_data_set_are_found_by_type(tmp_path, splits):
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog"])})
    (tmp_path / "set" / "data").mkdir(parents=True)
    for part, split in enumerate(splits):
        pictures = [Image.new("RGB", (8, 8), (0, 0, 100 * part + i)) for i in range(3)]
        table = datasets.Dataset.from_dict({"picture": pictures, "kind": [0, 1, 1]}, features=features)
        table.to_parquet(tmp_path / "set" / "data" / f"{split}-00000-of-00001.parquet")
    data = ImageDataModule(str(tmp_path / "set"), vit(), cache_dir=str(tmp_path / "cache"))
    data.setup("fit")
    assert data.class_names == ("cat", "dog")
    images, labels = images_of(data.val_dataloader())
    assert labels.tolist() == [0, 1, 1]
    blue = images[:, 2].mean(dim=(1, 2))
    first = 100 * min(1, len(splits) - 1)  # the second split, or the only one
    torch.testing.assert_close(blue, torch.tensor([first, first + 1, first + 2]) / 255 * 2 - 1, atol=0.01, rtol=0)
    if len(splits) > 1:
        assert len(images_of(data.train_dataloader())[0]) == 3


def test_ambiguous_columns_are_refused():
    image, label, text = datasets.Image(), datasets.ClassLabel(names=["a"]), datasets.Value("string")
    cifar100 = {"img": image, "fine_label": label, "coarse_label": label}
    assert find_columns(cifar100, "cifar100", "fine_label") == ("img", "fine_label")
    for features, found in (
        (cifar100, r"img \(Image\), fine_label \(ClassLabel\), coarse_label \(ClassLabel\)"),
        ({"img": image, "text": text}, r"img \(Image\), text \(Value\)"),
    ):
        with pytest.raises(ValueError, match=rf"some/set must have one column of type Image .* it has {found}"):
            find_columns(features, "some/set")


def test_bad_folders_are_refused(tmp_path, imagenet):
    (tmp_path / "list.txt").write_text("")
    for wrong in (tmp_path / "missing", tmp_path / "list.txt", ""):
        with pytest.raises(ValueError, match=r"an existing folder .* but it is .*(missing|list\.txt|'')"):
            ImageDataModule(wrong)
    paint(imagenet / "val" / "red", (0, 0), 1)
    with pytest.raises(ValueError, match="training images for each class, but has none in train/red"):
        ImageDataModule(imagenet, vit()).setup("fit")
    shutil.rmtree(imagenet / "val")
    with pytest.raises(FileNotFoundError, match="val"):  # and not the training images
        ImageDataModule(imagenet, vit()).setup("validate")
    (imagenet / "val" / "blue").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"images to measure on, but the classes in .*val have none"):
        ImageDataModule(imagenet, vit()).setup("validate")


def test_evaluation_may_lack_classes(imagenet):
    paint(imagenet / "train" / "azure", (128, 255), 1)
    (imagenet / "val" / "azure").mkdir()
    shutil.rmtree(imagenet / "val" / "blue")
    data = ImageDataModule(str(imagenet), vit())
    data.setup("fit")
    assert (data.class_names, images_of(data.val_dataloader())[1].tolist()) == (("azure", "blue", "green"), [2, 2])
    assert sorted(images_of(data.train_dataloader())[1].tolist()) == [0] + [1] * 4 + [2] * 4


def test_a_broken_image_is_named(imagenet):
    path = imagenet / "val" / "green" / "1.png"
    path.write_bytes(path.read_bytes()[:60])
    data = ImageDataModule(str(imagenet), vit())
    data.setup("validate")
    with pytest.raises(ValueError, match=r"The image .*val/green/1\.png cannot be read: (OSError|SyntaxError)"):
        images_of(data.val_dataloader())


def test_a_broken_image_in_a_table_is_named_and_ambiguous_splits_are_refused():
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a"])})
    picture = io.BytesIO()
    Image.new("L", (8, 8)).save(picture, "PNG")
    pictures = [{"bytes": picture.getvalue(), "path": None}, {"bytes": picture.getvalue()[:45], "path": None}]
    table = datasets.Dataset.from_dict({"image": pictures, "label": [0, 0]}, features=features)
    images = _from_splits({"test": table}, "some/set", None).evaluation
    assert images[0][1] == 0
    with pytest.raises(ValueError, match=r"The image in row 1 of some/set cannot be read: "):
        _ = images[1]
    with pytest.raises(ValueError, match="named validation, val, test, but it has left, right"):
        _from_splits({"left": table, "right": table}, "some/set", None)
