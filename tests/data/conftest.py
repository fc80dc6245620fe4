"""A tokenizer, and a folder of images."""

import pytest
from support.data import byte_tokenizer, few_digits as few_digits, paint


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def imagenet(tmp_path):
    folder = tmp_path / "data"
    for part, count in (("train", 4), ("val", 2)):
        paint(folder / part / "blue", (0, 0), count)
        paint(folder / part / "green", (0, 255), count)
    return folder
