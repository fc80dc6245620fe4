"""The image classifier module against slow loops and plain timm."""

import lightning as L
import pytest
import timm
import torch
from support.callbacks import same, trainer
from support.modules import CONVNEXT, VIT, tiny_vit
from torch import nn
from torch.utils.data import DataLoader

from wanda_lightning.data.images import class_names_of
from wanda_lightning.modules import ImageClassifierModule

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*but have no `val_dataloader`"
)


@pytest.mark.parametrize(
    ("num_classes", "keys"), [(3, None), (10, ("image", "label")), (10, ("pixel_values", "labels"))]
)
def test_validate_and_test_equal_a_slow_loop(num_classes, keys):
    module = tiny_vit(num_classes=num_classes)
    images = torch.randn(7, 3, 32, 32)
    labels = torch.arange(7) % num_classes
    with torch.no_grad():
        logits = module.model.eval()(images)
    module.model.train()
    ranks = [
        sum(bool(row[j] > row[y]) for j in range(num_classes))
        for row, y in zip(logits, labels, strict=True)
    ]
    losses = [-row.log_softmax(0)[y].item() for row, y in zip(logits, labels, strict=True)]
    expected = {"accuracy": sum(rank < 1 for rank in ranks) / 7, "loss": sum(losses) / 7}
    if num_classes > 5:
        expected["accuracy_top5"] = sum(rank < 5 for rank in ranks) / 7
    samples = list(zip(images, labels, strict=True))
    if keys:
        samples = [dict(zip(keys, sample, strict=True)) for sample in samples]
    loader = DataLoader(samples, batch_size=3)
    for loop, prefix in ((trainer().validate, "val"), (trainer().test, "test")):
        (measured,) = loop(module, loader, verbose=False)
        assert measured == {
            f"{prefix}_{name}": pytest.approx(value, rel=1e-5) for name, value in expected.items()
        }


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
    (expected,) = trainer().validate(module, DataLoader(samples[3:]), verbose=False)
    with pytest.raises(TypeError, match="must be Tensor, not NoneType"):
        trainer().validate(
            module,
            DataLoader([*samples[:3], (torch.zeros(3, 32, 32),)], batch_size=1),
            verbose=False,
        )
    assert trainer().validate(module, DataLoader(samples[3:]), verbose=False) == [expected]


@pytest.mark.parametrize(
    ("name", "kwargs"), [("timm:vit_tiny_patch16_224", VIT), ("convnext_atto", CONVNEXT)]
)
def test_saves_a_timm_folder(tmp_path, name, kwargs):
    torch.manual_seed(0)
    module = ImageClassifierModule(name, pretrained=False, num_classes=7, model_kwargs=kwargs)
    module.save_pretrained(tmp_path / "model")
    assert {file.name for file in (tmp_path / "model").iterdir()} == {
        "config.json",
        "model.safetensors",
    }
    loaded = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)
    assert same(loaded, module.model)
    again = ImageClassifierModule(f"local-dir:{tmp_path / 'model'}")
    assert same(again.model, module.model)
    assert again.num_classes == 7
    with pytest.raises(FileExistsError, match="not empty"):
        module.save_pretrained(tmp_path / "model")


class Pictures(L.LightningDataModule):
    class_names = tuple("abcdefghij")

    def train_dataloader(self):
        return DataLoader(
            list(zip(torch.randn(8, 3, 32, 32), torch.arange(8), strict=True)), batch_size=8
        )


def test_the_saved_model_knows_its_classes(tmp_path):
    module = tiny_vit()
    trainer(max_steps=1, log_every_n_steps=1).fit(module, Pictures())
    module.save_pretrained(tmp_path / "model")
    again = ImageClassifierModule(f"local-dir:{tmp_path / 'model'}")
    assert class_names_of(again) == class_names_of(module) == tuple("abcdefghij")
    again.save_pretrained(tmp_path / "again")
    assert class_names_of(ImageClassifierModule(f"local-dir:{tmp_path / 'again'}")) == tuple(
        "abcdefghij"
    )
    assert class_names_of(tiny_vit()) == class_names_of("test_vit") == ()


def test_only_timm_models_are_saved_and_only_classifiers_taken(tmp_path):
    module = ImageClassifierModule(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), num_classes=2)
    with pytest.raises(ValueError, match="must be a timm model for save_pretrained"):
        module.save_pretrained(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
    for build in (lambda: ImageClassifierModule(nn.Linear(2, 2)), lambda: tiny_vit(num_classes=0)):
        with pytest.raises(ValueError, match=r"`num_classes` .* larger than 1"):
            build()
