"""Images against transforms by hand, and what the data module refuses."""

import random
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits
from support.callbacks import SaveAt, batches_of_each_step, validate_module
from support.cli import save_noise
from support.data import images_of, opened, paint, vit
from support.layers import rng
from support.refusals import refuses
from torch import nn

from wanda_lightning import ImageClassifierModule, ImageDataModule
from wanda_lightning.data.images import class_names_of, resolve_preprocessing

pytestmark = [
    pytest.mark.usefixtures("few_digits"),
    # Models are made without regard to the images.
    pytest.mark.filterwarnings("ignore:.*and the model has .* outputs"),
]


@pytest.mark.parametrize("in_chans", [1, 3])
def test_digits_are_resized_whole_and_normalized_for_the_model(in_chans):
    model = vit(in_chans)
    data = opened("digits", model, batch_size=7)
    images, labels = next(iter(data.val_dataloader()))
    assert images.shape == (7, in_chans, 16, 16)
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    # The first image is one of the scans with its label.
    distances = []
    for scan in load_digits().images[load_digits().target == labels[0].item()]:
        picture = Image.fromarray((scan * 255 / 16).round().astype(np.uint8))
        resized = np.asarray(picture.resize((16, 16), Image.Resampling.BICUBIC))
        distances.append(np.abs(images[0].numpy() - (resized / 255 - 0.5) / 0.5).max())
    assert min(distances) < 1e-5
    assert model(images).shape == (7, 10)


@pytest.mark.parametrize("seed", [0, 1])
def test_calibration_images_are_a_seeded_choice_of_training_images(seed):
    data = opened("digits", vit(), num_samples=64, seed=seed)
    images, labels = images_of(data.calibration_dataloader())
    train = torch.stack([image for image, _ in data.train_dataloader().dataset])
    assert torch.equal(images, train[torch.randperm(240, generator=rng(seed))[:64]])
    assert len(labels.unique()) == 10
    assert data.describe_calibration(1) == f"digits, 1 image, seed {seed}"
    assert data.describe_calibration(100) == f"digits, 64 images, seed {seed}"
    assert data.describe_evaluation() == "digits, 60 images"


def test_images_before_setup_are_an_error():
    with refuses(r"^setup\(\) opens the images"):
        _ = ImageDataModule("digits", vit()).num_classes


def test_training_on_digits_shuffles_by_the_seed_and_mirrors_nothing():
    loaded = []
    for seed in (0, 0, 1):
        data = opened("digits", vit(), seed=seed)
        loaded.append(images_of(data.train_dataloader())[0])
    first, again, other = loaded
    assert torch.equal(first, again)
    assert not torch.equal(first, other)

    def in_any_order(images):
        return sorted(image.numpy().tobytes() for image in images)

    calibration = images_of(data.calibration_dataloader())[0]
    assert in_any_order(other) == in_any_order(calibration)


def images_of_each_step(data, *callbacks, **options):
    return batches_of_each_step(
        ImageClassifierModule(vit(), num_classes=10), data, *callbacks, **options
    )


def test_a_run_that_is_resumed_at_any_step_reads_the_batches_of_an_uninterrupted_one(tmp_path):
    whole = images_of_each_step(ImageDataModule("digits", batch_size=80), SaveAt(tmp_path, 2, 3, 4))
    assert whole[0] != whole[3]  # each epoch has an order of its own
    for step in (2, 3, 4):
        resumed = images_of_each_step(
            ImageDataModule("digits", batch_size=80), ckpt_path=tmp_path / f"{step}.ckpt"
        )
        assert resumed == whole[step:]


def test_a_resumed_run_with_workers_augments_in_the_same_way(imagenet, tmp_path):
    def data():
        return ImageDataModule(imagenet, batch_size=4, num_workers=2)

    whole = images_of_each_step(data(), SaveAt(tmp_path, 2))  # of two steps an epoch
    assert images_of_each_step(data(), ckpt_path=tmp_path / "2.ckpt") == whole[2:]


def test_transforms_come_from_the_model_of_the_trainer(monkeypatch):
    from lightning.pytorch.trainer.connectors import data_connector

    monkeypatch.setattr(data_connector, "suggested_max_num_workers", lambda _: 31)
    data = ImageDataModule("digits", batch_size=50)
    shapes = []
    for channels in (1, 3):
        module = ImageClassifierModule(vit(in_chans=channels), num_classes=10)
        module.model.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
        validate_module(module, data=data)
    assert shapes == [(images, channels, 16, 16) for channels in (1, 3) for images in (50, 10)]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(2, 2), "pretrained_cfg .* but Linear has none"),
        (None, "^model must be given, .* no Trainer runs"),
        (vit(num_classes=3), "digits has 10 and the model 3"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(model, message):
    with refuses(message):
        ImageDataModule("digits", model).setup("fit")


def test_calibration_is_not_augmented_but_training_is(tmp_path):
    for part in ("train", "val"):
        save_noise(tmp_path / part / "noise", 1, np.random.default_rng())
    data = opened(str(tmp_path), vit())
    first, again = (images_of(data.calibration_dataloader())[0] for _ in range(2))
    assert torch.equal(first, again)
    torch.manual_seed(0)
    random.seed(0)
    first, again = (images_of(data.train_dataloader())[0] for _ in range(2))
    assert not torch.equal(first, again)


@pytest.mark.parametrize("folder", [".", "val"])
def test_a_folder_without_training_images_measures_and_if_it_has_only_classes_calibrates(
    imagenet, folder
):
    shutil.rmtree(imagenet / "train")
    data = opened(imagenet / folder, vit())
    assert labels_of(data) == [0, 0, 1, 1]
    with refuses("has only evaluation images"):
        data.train_dataloader()
    if folder == "val":
        assert sorted(images_of(data.calibration_dataloader())[1].tolist()) == [0, 0, 1, 1]
        return
    with refuses("has only evaluation images"):
        data.calibration_dataloader()


def named_vit(*names):
    model = vit(num_classes=len(names))
    model.pretrained_cfg["label_names"] = list(names)
    return model


def labels_of(data):
    return images_of(data.val_dataloader())[1].tolist()


@pytest.mark.filterwarnings("error")
def test_class_folders_are_the_outputs_with_their_names(imagenet):
    model = named_vit("red", "green", "azure", "blue")
    data = opened(imagenet, model)
    assert data.class_names == ("red", "green", "azure", "blue")
    assert labels_of(data) == [3, 3, 1, 1]
    assert sorted(images_of(data.train_dataloader())[1].tolist()) == [1] * 4 + [3] * 4
    model.pretrained_cfg["label_names"] = {"0": "green", "1": "blue", "2": "red", "3": "azure"}
    data.setup("validate")  # the model has other labels now
    assert labels_of(data) == [1, 1, 0, 0]


@pytest.mark.filterwarnings("error")
def test_class_folders_of_imagenet_are_its_outputs(tmp_path):
    for name in ("n01443537", "n15075141"):  # the second and the last of the 1000
        paint(tmp_path / name, (0, 0), 1)
    assert labels_of(opened(tmp_path, vit(num_classes=1000))) == [1, 999]


@pytest.mark.filterwarnings("default:.*and the model has .* outputs")
@pytest.mark.parametrize(
    ("model", "said"),
    [
        (
            vit(num_classes=5),
            "has 2 classes, and the model has 5 outputs. Class i, counted from 'blue' = 0",
        ),
        (
            vit(num_classes=1000),
            "and the model has 1000 outputs, and its classes have other names than 'blue'",
        ),
        (
            named_vit("cat", "green"),
            "and the model has 2 outputs, and its classes have other names than 'blue'",
        ),
    ],
)
def test_an_assumed_class_order_warns(imagenet, model, said, recwarn):
    assert labels_of(opened(imagenet / "val", model)) == [0, 0, 1, 1]
    (message,) = (str(each.message) for each in recwarn if "outputs" in str(each.message))
    assert said in message


@pytest.mark.filterwarnings("error")
def test_as_many_classes_as_outputs_without_names_do_not_warn(imagenet):
    assert labels_of(opened(imagenet / "val", vit(num_classes=2))) == [0, 0, 1, 1]


@pytest.mark.parametrize("name", ["convnext_atto", "timm:convnext_atto.d2_in1k"])
def test_preprocessing_of_a_name_is_that_of_the_model(name):
    model = timm.create_model("convnext_atto", num_classes=10)
    preprocessing = resolve_preprocessing(model)
    assert preprocessing["input_size"] == (3, 224, 224)
    assert preprocessing["mean"] == (0.485, 0.456, 0.406)
    assert preprocessing["crop_pct"] == 0.875
    assert resolve_preprocessing(name) == preprocessing
    assert resolve_preprocessing(name, image_size=64)["input_size"] == (3, 64, 64)


def test_a_model_for_gray_images_gets_the_average_normalization():
    module = ImageClassifierModule(timm.create_model("resnet18", in_chans=1))
    preprocessing = resolve_preprocessing(module)
    assert preprocessing["input_size"] == (1, 224, 224)
    assert preprocessing["mean"] == pytest.approx(((0.485 + 0.456 + 0.406) / 3,))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (None, ""),
        (["a", "b", "c"], "abc"),
        ({0: "a", 1: "b", 2: "c"}, "abc"),
        (["a", "b"], ""),  # those of another head
    ],
)
def test_class_names_come_from_the_model(names, expected):
    model = vit(num_classes=3)
    model.pretrained_cfg["label_names"] = names
    assert class_names_of(model) == tuple(expected)
    assert class_names_of(ImageClassifierModule(model)) == tuple(expected)
