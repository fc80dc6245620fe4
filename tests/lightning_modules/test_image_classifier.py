"""The image classifier module against plain timm."""

import lightning as L
import pytest
import timm
import torch
from support.callbacks import WITHOUT_ADVICE, same, trainer, validate_module
from support.modules import CONVNEXT, VIT, tiny_vit
from support.refusals import refuses
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from wanda_lightning.data.images import class_names_of
from wanda_lightning.lightning_modules import ImageClassifierModule

pytestmark = WITHOUT_ADVICE


@pytest.mark.parametrize(
    ("num_classes", "keys"), [(3, None), (10, ("image", "label")), (10, ("pixel_values", "labels"))]
)
def test_validate_and_test_are_about_all_images_together(num_classes, keys):
    module = tiny_vit(num_classes=num_classes)
    images = torch.randn(7, 3, 32, 32)
    labels = torch.arange(7) % num_classes
    with torch.no_grad():
        logits = module.model.eval()(images)
    module.model.train()

    is_label = logits.argsort(descending=True) == labels[:, None]
    expected = {
        "loss": F.cross_entropy(logits, labels).item(),
        "accuracy": is_label[:, 0].sum().item() / 7,
    }
    if num_classes > 5:
        expected["accuracy_top5"] = is_label[:, :5].sum().item() / 7

    samples = list(zip(images, labels, strict=True))
    if keys:
        samples = [dict(zip(keys, sample, strict=True)) for sample in samples]
    loader = DataLoader(samples, batch_size=3)
    for loop, stage in ((trainer().validate, "val"), (trainer().test, "test")):
        (measured,) = loop(module, loader, verbose=False)
        named = {f"{stage}_{name}": value for name, value in expected.items()}
        assert measured == pytest.approx(named, rel=1e-5)


def test_predict_and_calibration_need_no_labels():
    module = tiny_vit()
    images = torch.randn(4, 3, 32, 32)
    (logits,) = trainer().predict(module, DataLoader(images, batch_size=4))
    with torch.no_grad():
        assert torch.equal(logits, module.model.eval()(images))
    for batch in (images, [images], {"image": images}, (images, torch.zeros(4))):
        assert module.calibration_step(batch).shape == (4, 10)


def test_an_interrupted_loop_does_not_change_the_next_one():
    module = tiny_vit()
    samples = list(zip(torch.randn(6, 3, 32, 32), torch.arange(6), strict=True))
    whole = DataLoader(samples[3:])
    expected = validate_module(module, data=whole)
    without_label = DataLoader([*samples[:3], (torch.zeros(3, 32, 32),)])
    with pytest.raises(TypeError, match="must be Tensor, not NoneType"):
        validate_module(module, data=without_label)
    assert validate_module(module, data=whole) == expected


@pytest.mark.parametrize(
    ("name", "kwargs"), [("timm:vit_tiny_patch16_224", VIT), ("convnext_atto", CONVNEXT)]
)
def test_saves_a_timm_folder(tmp_path, name, kwargs):
    module = ImageClassifierModule(name, pretrained=False, num_classes=7, model_kwargs=kwargs)
    module.save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]

    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert same(loaded, module.model)
    again = ImageClassifierModule(tmp_path)
    assert same(again.model, module.model)
    assert again.num_classes == 7
    with pytest.raises(FileExistsError, match="not empty"):
        module.save_pretrained(tmp_path)


class Pictures(L.LightningDataModule):
    class_names = tuple("abcdefghij")

    def train_dataloader(self):
        samples = list(zip(torch.randn(8, 3, 32, 32), torch.arange(8), strict=True))
        return DataLoader(samples, batch_size=8)


def test_a_saved_model_knows_its_classes(tmp_path):
    module = tiny_vit()
    trainer(max_steps=1, log_every_n_steps=1).fit(module, Pictures())
    assert class_names_of(module) == Pictures.class_names
    module.save_pretrained(tmp_path / "model")
    again = ImageClassifierModule(tmp_path / "model")
    assert class_names_of(again) == Pictures.class_names
    again.save_pretrained(tmp_path / "again")
    assert class_names_of(ImageClassifierModule(tmp_path / "again")) == Pictures.class_names


def test_a_model_without_class_names():
    assert class_names_of(tiny_vit()) == class_names_of("test_vit") == ()


def test_only_a_model_of_timm_is_saved(tmp_path):
    module = ImageClassifierModule(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), num_classes=2)
    with refuses("must be a timm model for save_pretrained"):
        module.save_pretrained(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "build", [lambda: ImageClassifierModule(nn.Linear(2, 2)), lambda: tiny_vit(num_classes=0)]
)
def test_only_a_classifier_is_taken(build):
    with refuses(r"`num_classes` .* larger than 1"):
        build()
