"""Data types by name and as objects of torch."""

import pytest
import torch
from support.refusals import refuses

from wanda_lightning.common.dtypes import dtype_name


def test_a_dtype_has_the_name_that_stands_for_it():
    assert dtype_name(torch.bfloat16) == dtype_name("bfloat16") == "bfloat16"
    assert dtype_name("auto") == "auto"


@pytest.mark.parametrize("dtype", [torch.float64, "float65", 16, None])
def test_other_dtypes_are_refused(dtype):
    with refuses("dtype must be one of auto, float32, bfloat16, float16, but it is '"):
        dtype_name(dtype)
