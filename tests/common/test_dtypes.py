"""Data types by name and as objects of torch."""

import pytest
import torch

from wanda_lightning.common.dtypes import DTYPES, dtype_name


def test_a_dtype_has_the_name_that_stands_for_it():
    for name, dtype in DTYPES.items():
        assert dtype_name(dtype) == name == dtype_name(name)
    assert dtype_name("auto") == "auto"


@pytest.mark.parametrize(
    ("dtype", "shown"),
    [(torch.float64, "'float64'"), ("float65", "'float65'"), (16, "16"), (None, "None")],
)
def test_other_dtypes_are_refused(dtype, shown):
    expected = f"dtype must be one of auto, float32, bfloat16, float16, but it is {shown}."
    with pytest.raises(ValueError, match=expected):
        dtype_name(dtype)
