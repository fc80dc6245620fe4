"""Values that a method is constructed with, inside and outside of their ranges."""

from dataclasses import dataclass

import numpy as np
import pytest

from wanda_lightning.core.hyperparameters import Number, OneOf, check


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
