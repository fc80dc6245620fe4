"""Check the token ids of a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wanda_lightning.common.errors import UserError


def number_of_embeddings(model: Any) -> int | None:
    """Return the number of token embeddings of a transformers model, or None if it is not known."""
    try:
        return int(model.get_input_embeddings().num_embeddings)
    except (AttributeError, NotImplementedError):
        return None


def check_tokens(model: Any, input_ids: object) -> None:
    """Raise a ValueError for anything but a tensor of token ids, and for ids without an embedding in the model.

    Such ids raise an IndexError in PyTorch, and on a CUDA device they end the process.
    """
    found = ""
    if not isinstance(input_ids, Tensor):
        found = f"a {type(input_ids).__name__}"
    elif input_ids.dtype not in (torch.int64, torch.int32):
        found = f"of {input_ids.dtype}"
    elif input_ids.ndim < 2 or not input_ids.numel():
        found = f"of shape {tuple(input_ids.shape)}"
    if found:
        raise UserError(
            f"input_ids must be a tensor of int64, of shape (samples, tokens), but it is {found}. A tokenizer returns "
            "one with return_tensors='pt'."
        )
    assert isinstance(input_ids, Tensor)
    embeddings = number_of_embeddings(model)
    low, high = (int(bound) for bound in input_ids.aminmax())
    if embeddings is not None and (low < 0 or high >= embeddings):
        raise UserError(
            f"input_ids must be from 0 to {embeddings - 1}, since the model has {embeddings} embeddings, but one is "
            f"{low if low < 0 else high}. Use the tokenizer that the model was trained with."
        )
