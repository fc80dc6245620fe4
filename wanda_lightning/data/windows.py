"""Draw windows of tokens for calibration and cut them for perplexity, as in Sun et al. 2024 (Wanda)."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from wanda_lightning.common.errors import UserError


def draw_from_text(ids: Sequence[int], seqlen: int, num_samples: int, seed: int, source: str) -> Tensor:
    """Draw windows that start anywhere in one text, as token ids of shape (num_samples, seqlen).

    `random.Random(seed)` draws the same windows as the reference code does for WikiText-2. Errors name the `source`.
    """
    if len(ids) <= seqlen:
        raise UserError(
            f"seqlen={seqlen} needs a text of at least {seqlen + 1} tokens, but {source} has {len(ids)}. Choose a "
            "smaller seqlen or a longer text."
        )
    rng = random.Random(seed)
    tokens = torch.tensor(ids, dtype=torch.long)
    windows = torch.empty(num_samples, seqlen, dtype=torch.long)
    for window in windows:
        start = rng.randint(0, len(ids) - seqlen - 1)
        window.copy_(tokens[start : start + seqlen])
    return windows


def draw_from_documents(
    documents: Sequence[str],
    tokenize: Callable[[str], Sequence[int]],
    seqlen: int,
    num_samples: int,
    seed: int,
    source: str,
) -> Tensor:
    """Draw windows from documents, as token ids of shape (num_samples, seqlen).

    For each window, draw documents until one is longer than `seqlen`, then draw where the window starts in it.
    `random.Random(seed)` draws the same windows as the reference code does for C4. Only drawn documents are tokenized.
    """
    rng = random.Random(seed)
    too_short: dict[int, int] = {}  # number of tokens by document
    windows = torch.empty(num_samples, seqlen, dtype=torch.long)
    drawn = 0
    while drawn < num_samples:
        if len(too_short) == len(documents):
            raise UserError(
                f"seqlen={seqlen} needs a document of at least {seqlen + 1} tokens, but the longest of the "
                f"{len(documents)} documents of {source} has {max(too_short.values())}. Choose a smaller seqlen, or "
                "give a .txt file, which is read as one text."
            )
        i = rng.randint(0, len(documents) - 1)
        if i in too_short:
            continue
        ids = tokenize(documents[i])
        if len(ids) <= seqlen:
            too_short[i] = len(ids)
            continue
        start = rng.randint(0, len(ids) - seqlen - 1)
        windows[drawn] = torch.tensor(ids[start : start + seqlen], dtype=torch.long)
        drawn += 1
    return windows


def cut(ids: Sequence[int], seqlen: int, limit: int | None, source: str) -> Tensor:
    """Cut a text into adjacent windows for perplexity, at most `limit`, and drop the rest at the end.

    >>> cut([1, 2, 3, 4, 5, 6, 7], seqlen=3, limit=None, source="a.txt")
    tensor([[1, 2, 3],
            [4, 5, 6]])
    """
    count = len(ids) // seqlen
    if count == 0:
        raise UserError(
            f"seqlen={seqlen} needs a text of at least {seqlen} tokens, but {source} has {len(ids)}. Choose a smaller "
            "seqlen or a longer text."
        )
    return torch.tensor(ids[: count * seqlen], dtype=torch.long).view(count, seqlen)[:limit]
