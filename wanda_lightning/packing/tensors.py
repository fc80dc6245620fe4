"""Pack and unpack PyTorch tensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from wanda_lightning.packing import codec

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def unpacked(values: Tensor, positions: codec.Bytes, shape: Sequence[int], code: str) -> Tensor:
    """Return the matrix with these values at these positions, on the device of the values.

    Raises:
        ValueError: If values and positions disagree.
    """
    words = values.cpu().contiguous().view(_WORDS[values.element_size()]).numpy()
    words = codec.unpack(words.view(f"u{words.itemsize}"), positions, shape, code)
    matrix = torch.from_numpy(words.view(np.dtype(f"i{words.itemsize}"))).view(values.dtype)
    return matrix.reshape(tuple(shape)).to(values.device)
