"""Unreachable data sets of the hub raise one clear error."""

import time

import datasets
import pytest
from support.data import vit

from wanda_lightning.common.errors import UserError
from wanda_lightning.data import ImageDataModule, TextDataModule

pytestmark = pytest.mark.filterwarnings("ignore:.*and the model has .* outputs")  # models without regard to the images


@pytest.mark.parametrize(("source", "name"), [("c4", "allenai/c4"), ("wikitext2", "Salesforce/wikitext")])
def test_an_unreachable_hub_is_one_clear_error(tmp_path, offline, tokenizer, source, name):
    data = TextDataModule(tokenizer, source, source, cache_dir=str(tmp_path))
    message = rf"{name} is not in the cache, and .* cannot be reached\. Use python-docs"
    for read in (data.setup, data.calibration_dataloader):
        with pytest.raises(OSError, match=message) as error:
            read()
        assert isinstance(error.value.__cause__, ConnectionError)


def test_an_unreachable_hub_is_asked_once(tmp_path, monkeypatch, tokenizer):
    slept = []
    for name, value in {"HF_HUB_OFFLINE": False, "ENDPOINT": "http://127.0.0.1:9"}.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(time, "sleep", slept.append)
    with pytest.raises(OSError, match=r"allenai/c4 is not in the cache, and .* cannot be reached.* Connection refused"):
        TextDataModule(tokenizer, "c4", cache_dir=str(tmp_path)).calibration_dataloader()
    assert slept == []
    assert not datasets.config.HF_HUB_OFFLINE


@pytest.mark.parametrize("data", ["cifar10", "some/images"])
def test_images_from_an_unreachable_hub_are_one_clear_error(tmp_path, offline, data):
    module = ImageDataModule(data, vit(num_classes=100), cache_dir=str(tmp_path))
    with pytest.raises(OSError, match=r"is not in the cache, and .* cannot be reached\. Use digits") as error:
        module.setup("fit")
    assert isinstance(error.value.__cause__, ConnectionError)


def test_images_are_downloaded_before_they_are_opened(monkeypatch, imagenet):
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **options: asked.append((name, options)))
    for data in ("digits", str(imagenet), "cifar10", "some/images"):
        ImageDataModule(data, cache_dir="cache").prepare_data()
    assert asked == [(name, {"cache_dir": "cache"}) for name in ("uoft-cs/cifar10", "some/images")]


def test_a_data_set_with_several_configurations_must_be_loaded(monkeypatch, tokenizer):
    def load_dataset(name, **options):
        raise ValueError("Config name is missing.")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"load it with datasets\.load_dataset and give the result"):
        TextDataModule(tokenizer, evaluation="own/news").prepare_data()
