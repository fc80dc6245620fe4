"""A tokenizer, and a folder of images."""

import pytest
from support.data import byte_tokenizer, few_digits, paint

__all__ = ["few_digits"]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def imagenet(tmp_path):
    for part, count in (("train", 4), ("val", 2)):
        paint(tmp_path / "data" / part / "blue", (0, 0), count)
        paint(tmp_path / "data" / part / "green", (0, 255), count)
    return tmp_path / "data"
