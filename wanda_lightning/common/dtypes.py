"""The data types in which models are loaded, by name and as objects of torch."""

import torch

from wanda_lightning.common.checks import check_values

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPE_NAMES = ("auto", *DTYPES)


def dtype_name(dtype: str | torch.dtype) -> str:
    """Return a data type as its name, such as "bfloat16" for `torch.bfloat16`; "auto" stays as it is.

    Raises a ValueError for anything that is not in `DTYPE_NAMES`.
    """
    name = str(dtype).removeprefix("torch.")
    check_values(DTYPE_NAMES, dtype=name)
    return name
