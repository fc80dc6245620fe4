"""Draw windows of tokens from texts, documents and chats, with the random numbers of Sun et al. 2024 (Wanda)."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wanda_lightning.common.errors import UserError
from wanda_lightning.data.chats import PADDING, Chats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokens = Sequence[int]


def draw_from_text(ids: Tokens, seqlen: int, num_samples: int, seed: int, source: str) -> Tensor:
    """Draw windows that start anywhere in one text, as token ids of shape (num_samples, seqlen).

    `random.Random(seed)` draws the same windows as the reference code does for WikiText-2. Errors name the `source`.
    """
    _refuse_short(ids, seqlen, seqlen + 1, source)
    rng = random.Random(seed)
    windows = [_draw_window(ids, seqlen, rng) for _ in range(num_samples)]
    return torch.tensor(windows, dtype=torch.long)


def _refuse_short(ids: Tokens, seqlen: int, needed: int, source: str) -> None:
    if len(ids) < needed:
        raise UserError(
            f"seqlen={seqlen} needs a text of at least {needed} tokens, but {source} has {len(ids)}. Choose a "
            "smaller seqlen or a longer text."
        )


def _draw_window(ids: Tokens, seqlen: int, rng: random.Random) -> Tokens:
    """Draw a window that does not end with the last token, as in the reference code."""
    start = rng.randint(0, len(ids) - seqlen - 1)
    return ids[start : start + seqlen]


def draw_from_documents(
    documents: Sequence[str],
    tokenize: Callable[[str], Tokens],
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
    lengths: dict[int, int] = {}  # in tokens, of the documents that were drawn and are too short
    windows: list[Tokens] = []
    while len(windows) < num_samples:
        # The reference code would draw forever.
        if len(lengths) == len(documents):
            raise UserError(
                f"seqlen={seqlen} needs a document of at least {seqlen + 1} tokens, but the longest of the "
                f"{len(documents)} documents of {source} has {max(lengths.values(), default=0)}. Choose a smaller "
                "seqlen, or give a .txt file, which is read as one text."
            )

        index = rng.randint(0, len(documents) - 1)
        if index in lengths:
            continue
        ids = tokenize(documents[index])
        if len(ids) > seqlen:
            windows.append(_draw_window(ids, seqlen, rng))
        else:
            lengths[index] = len(ids)
    return torch.tensor(windows, dtype=torch.long)


def draw_from_chats(
    chats: Chats,
    tokenizer: PreTrainedTokenizerBase,
    seqlen: int,
    num_samples: int,
    seed: int,
    packing: str,
) -> Tensor:
    """Draw windows from conversations in a random order, as token ids of shape (num_samples, seqlen).

    With `packing="windows"`, the conversations are joined and cut into adjacent windows. With `"none"`, each begins a
    row of its own, is cut at `seqlen`, and followed by -1. Only drawn conversations are written and tokenized.
    """
    order = random.Random(seed).sample(range(len(chats)), len(chats))
    if packing == "windows":
        needed = num_samples * seqlen
        ids = chats.joined(tokenizer, needed, order)
        if len(ids) < needed:
            raise UserError(
                f"{num_samples} windows of seqlen={seqlen} need {needed:,} tokens, but the {len(chats):,} chats of "
                f"{chats.source} have {len(ids):,}. Choose fewer samples, a smaller seqlen, or packing='none'."
            )
        return torch.tensor(ids[:needed], dtype=torch.long).view(num_samples, seqlen)

    if len(chats) < num_samples:
        raise UserError(
            f"{num_samples} rows with packing='none' need as many chats, but {chats.source} has {len(chats):,}. Choose "
            "fewer samples, or packing='windows'."
        )
    windows = torch.full((num_samples, seqlen), PADDING)
    for window, index in zip(windows, order[:num_samples], strict=True):
        ids = chats.tokens(index, tokenizer)[:seqlen]
        window[: len(ids)] = torch.tensor(ids)
    return windows


def cut(ids: Tokens, seqlen: int, limit: int | None, source: str) -> Tensor:
    """Cut a text into adjacent windows for perplexity, at most `limit`, and drop the rest at the end.

    >>> cut([1, 2, 3, 4, 5, 6, 7], seqlen=3, limit=None, source="a.txt")
    tensor([[1, 2, 3],
            [4, 5, 6]])
    """
    _refuse_short(ids, seqlen, seqlen, source)
    count = len(ids) // seqlen
    return torch.tensor(ids[: count * seqlen], dtype=torch.long).view(count, seqlen)[:limit]
