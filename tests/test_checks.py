"""Option values that are refused before any library is loaded."""

import sys

import numpy as np
import pytest

from wanda_lightning.checks import check_at_least, check_not_negative, check_positive, require_extra


def test_whole_numbers_and_missing_ones_pass():
    check_positive(limit=None, seqlen=1, batch_size=np.int64(3))
    check_at_least(0, num_workers=0)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, "limit must be at least 1, but it is 0."),
        ("512", "limit must be a whole number, but it is '512'."),
        (2.0, "limit must be a whole number, but it is 2.0."),
        (True, "limit must be a whole number, but it is True."),
    ],
)
def test_other_values_are_refused(value, message):
    with pytest.raises(ValueError, match=r"limit must be") as caught:
        check_positive(limit=value)
    assert str(caught.value) == message
    with pytest.raises(ValueError, match=r"num_workers must be at least 0, but it is -1"):
        check_at_least(0, num_workers=-1)


@pytest.mark.parametrize("value", [-0.1, "1e-3", float("nan"), float("inf"), None])
def test_numbers_must_be_finite_and_not_negative(value):
    check_not_negative(lr=0.0, weight_decay=1)
    with pytest.raises(ValueError, match=rf"^lr must be a number of at least 0, but it is {value!r}\.$"):
        check_not_negative(lr=value)


def test_a_missing_package_names_its_extra(monkeypatch):
    require_extra("demo", "torch", purpose="Tensors")
    for name in ("gguf", "accelerate"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError) as caught:
        require_extra("demo", "gguf", "torch", "accelerate", purpose="GGUF files")
    assert str(caught.value) == "GGUF files need gguf and accelerate: pip install 'wanda_lightning[demo]'"
