"""Values inside and outside of their ranges, which are refused before any library is loaded."""

import sys
from dataclasses import dataclass

import numpy as np
import pytest

from wanda_lightning.common.checks import (
    Number,
    OneOf,
    check,
    check_at_least,
    check_positive,
    check_values,
    require_extra,
)


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
    check_values(Number(minimum=0), lr=0.0, weight_decay=1)
    with pytest.raises(ValueError, match=rf"^lr must be a number of at least 0, but it is {value!r}\.$"):
        check_values(Number(minimum=0), lr=value)


def test_a_missing_package_names_its_extra(monkeypatch):
    require_extra("demo", "torch", purpose="Tensors")
    for name in ("gguf", "accelerate"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError) as caught:
        require_extra("demo", "gguf", "torch", "accelerate", purpose="GGUF files")
    assert str(caught.value) == "GGUF files need gguf and accelerate: pip install '.[demo]' in the source folder"


@pytest.mark.parametrize(
    ("rule", "inside", "outside"),
    [
        (Number(above=0), [1e-9, 1, np.float64(3)], [0, -1.0, float("nan"), "1", None, True]),
        (Number(minimum=0, below=1), [0, 0.999], [1, 1.0, -1e-9]),
        (Number(minimum=0, maximum=0.5), [0.0, 0.5], [0.51]),
        (Number(minimum=1, whole=True), [1, 10**9, np.int64(2)], [0, 1.0, 2.5, "1", True]),
        (OneOf(("row", "layer")), ["row", "layer"], ["rows", "", None, 1, ["row"]]),
    ],
    ids=str,
)
def test_ranges(rule, inside, outside):
    assert all(map(rule.accepts, inside))
    assert not any(map(rule.accepts, outside))


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (Number(above=0), "a number above 0"),
        (Number(minimum=0, maximum=0.5), "a number of at least 0 and at most 0.5"),
        (Number(minimum=1, whole=True), "a whole number of at least 1"),
        (Number(whole=True), "a whole number"),
        (Number(minimum=0, text="0 or more"), "0 or more"),
        (OneOf(("row", "layer")), "one of row, layer"),
    ],
)
def test_rules_in_words(rule, text):
    assert str(rule) == text


def test_the_error_names_what_must_change():
    @dataclass(frozen=True)
    class Method:
        steps: object = 3
        rate: object = 0.5

    check(Method(), steps=Number(minimum=1, whole=True), rate=Number(above=0))
    with pytest.raises(ValueError, match=r"^rate of Method must be a number above 0, but it is 'fast'\.$"):
        check(Method(rate="fast"), steps=Number(minimum=1, whole=True), rate=Number(above=0))
