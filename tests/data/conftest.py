"""A tokenizer, no network, and a folder of images."""

import datasets
import pytest
from support.data import byte_tokenizer, few_digits, paint

__all__ = ["few_digits"]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def offline(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # read when it was imported
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def imagenet(tmp_path):
    for part, count in (("train", 4), ("val", 2)):
        paint(tmp_path / "data" / part / "blue", (0, 0), count)
        paint(tmp_path / "data" / part / "green", (0, 255), count)
    return tmp_path / "data"
