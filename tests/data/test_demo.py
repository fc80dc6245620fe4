"""The data sets that need no network: their two parts."""

import sys

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from support.data import (
    images_of,
    vit,
)

from wanda_lightning.data import ImageDataModule
from wanda_lightning.data.demo import python_docs

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*and the model has .* outputs"
)  # models are made without regard to the images


def test_python_docs_has_two_parts_without_a_common_paragraph():
    from pydoc_data.topics import topics

    calibration, evaluation = python_docs()
    assert {**calibration, **evaluation} == topics
    assert not calibration.keys() & evaluation.keys()
    share = sum(map(len, evaluation.values())) / sum(map(len, topics.values()))
    assert 0.25 < share < 0.35
    long = [
        {p.strip() for text in part.values() for p in text.split("\n\n") if len(p.strip()) >= 80}
        for part in (calibration, evaluation)
    ]
    assert all(long)
    assert not long[0] & long[1]
    assert python_docs() == (calibration, evaluation)


def test_digits_are_split_by_class_into_disjoint_parts():
    data = ImageDataModule("digits", vit())
    data.setup("fit")
    train, train_labels = images_of(data.calibration_dataloader())
    evaluation, labels = images_of(data.val_dataloader())
    assert (len(train), len(evaluation)) == (1437, 360)
    assert data.num_classes == 10
    assert data.class_names == tuple("0123456789")
    counts = np.bincount(load_digits().target)
    assert (np.abs(labels.bincount().numpy() - 0.2 * counts) < 1).all()
    everything = {image.numpy().tobytes() for image in torch.cat([train, evaluation])}
    assert len(everything) == len({image.tobytes() for image in load_digits().images})  # a scan may occur once only
    assert torch.equal((train_labels.bincount() + labels.bincount()), torch.tensor(counts))
    again = ImageDataModule("digits", vit(), seed=1)  # the parts do not depend on the seed
    again.setup("fit")
    assert torch.equal(images_of(again.val_dataloader())[0], evaluation)


def test_digits_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"^The digits need sklearn: pip install 'wanda_lightning\[demo\]'$"):
        ImageDataModule("digits")


def test_data_has_no_default():
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'data'"):
        ImageDataModule(model=vit())
