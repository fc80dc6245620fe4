"""Values inside and outside of their ranges, which are refused before any library is loaded."""

import re
import sys
from dataclasses import dataclass

import numpy as np
import pytest
from support.refusals import refuses

from wanda_lightning.common.checks import (
    Number,
    check,
    check_at_least,
    check_values,
    require_extra,
    shown,
)


def test_a_missing_package_names_its_extra(monkeypatch):
    require_extra("demo", "torch", purpose="Tensors")
    for name in ("gguf", "accelerate"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError) as caught:
        require_extra("demo", "gguf", "torch", "accelerate", purpose="GGUF files")
    assert (
        str(caught.value)
        == "GGUF files need gguf and accelerate: pip install '.[demo]' in the source folder"
    )


NAN = float("nan")
INFINITY = float("inf")


@pytest.mark.parametrize(
    ("rule", "text", "inside", "outside"),
    [
        (
            Number(above=0),
            "a number above 0",
            [1e-9, 1, np.float64(3)],
            [0, -1.0, NAN, INFINITY, "1", None, True],
        ),
        (
            Number(minimum=0, below=1),
            "a number of at least 0 and below 1",
            [0, 0.999],
            [1, 1.0, -1e-9],
        ),
        (
            Number(minimum=0, maximum=0.5),
            "a number of at least 0 and at most 0.5",
            [0.0, 0.5],
            [0.51],
        ),
        (
            Number(minimum=1, whole=True),
            "a whole number of at least 1",
            [1, np.int64(2)],
            [0, 1.0, 2.5, "1", True],
        ),
        (Number(whole=True), "a whole number", [-1, 10**300], [0.5, False]),
        (("row", "layer"), "one of row, layer", ["row", "layer"], ["rows", "", None, 1, ["row"]]),
        ((True, False), "one of True, False", [True], ["false", None, 2]),
    ],
    ids=str,
)
def test_rules(rule, text, inside, outside):
    @dataclass(frozen=True)
    class Method:
        rate: object

    for value in inside:
        check_values(rule, lr=value)
    for value in outside:
        with refuses(
            rf"^rate of Method must be {text}, but it is {re.escape(shown(value))}\.$",
        ):
            check(Method(value), rate=rule)


def test_options_that_must_be_set():
    for limit in (0, None):
        with refuses(rf"^limit must be a whole number of at least 1, but it is {limit}\.$"):
            check_at_least(1, batch_size=1, limit=limit)
