"""Draw windows of tokens for calibration and cut them for perplexity, as in Sun et al. 2024 (Wanda)."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def draw_from_text(ids: Sequence[int], seqlen: int, num_samples: int, seed: int, source: str = "the text") -> Tensor:
    """Draw windows that start anywhere in one text: `start = randint(0, len(ids) - seqlen - 1)`.

    `random.Random(seed)` draws the same windows as the reference code does for WikiText-2.

    Returns:
        Token ids of shape (num_samples, seqlen).

    Raises:
        ValueError: If the text does not have more than `seqlen` tokens.
    """
    if len(ids) <= seqlen:
        raise ValueError(
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
    source: str = "the source",
) -> Tensor:
    """Draw windows that lie in one document each: draw documents until one is longer than `seqlen`, then the start.

    `random.Random(seed)` draws the same windows as the reference code does for C4. Only drawn documents are tokenized,
    until `len(documents)` draws in a row were too short: then all are, to check that one is long enough.

    Returns:
        Token ids of shape (num_samples, seqlen).

    Raises:
        ValueError: If no document has more than `seqlen` tokens.
    """
    rng = random.Random(seed)
    too_short: dict[int, int] = {}  # number of tokens by document
    windows = torch.empty(num_samples, seqlen, dtype=torch.long)
    drawn = 0
    while drawn < num_samples:
        for _ in range(len(documents)):
            i = rng.randint(0, len(documents) - 1)
            ids = [] if i in too_short else tokenize(documents[i])
            if len(ids) > seqlen:
                start = rng.randint(0, len(ids) - seqlen - 1)
                windows[drawn] = torch.tensor(ids[start : start + seqlen], dtype=torch.long)
                drawn += 1
                break
            too_short.setdefault(i, len(ids))
        else:
            _require_long_document(documents, tokenize, seqlen, too_short, source)
    return windows


def _require_long_document(
    documents: Sequence[str],
    tokenize: Callable[[str], Sequence[int]],
    seqlen: int,
    too_short: dict[int, int],
    source: str,
) -> None:
    for i, document in enumerate(documents):
        if i in too_short:
            continue
        if (count := len(tokenize(document))) > seqlen:
            return
        too_short[i] = count
    raise ValueError(
        f"seqlen={seqlen} needs a document of at least {seqlen + 1} tokens, but the longest of the {len(documents)} "
        f"documents of {source} has {max(too_short.values())}. Choose a smaller seqlen, or give a .txt file, which is "
        "read as one text."
    )


def cut(ids: Sequence[int], seqlen: int, limit: int | None = None, source: str = "the text") -> Tensor:
    """Cut a text into adjacent windows for perplexity, and drop the rest at the end.

    >>> cut([1, 2, 3, 4, 5, 6, 7], seqlen=3)
    tensor([[1, 2, 3],
            [4, 5, 6]])

    Returns:
        Token ids of shape (windows, seqlen), at most `limit` windows.

    Raises:
        ValueError: If there are not enough tokens for one window.
    """
    count = len(ids) // seqlen
    if count == 0:
        raise ValueError(
            f"seqlen={seqlen} needs a text of at least {seqlen} tokens, but {source} has {len(ids)}. Choose a smaller "
            "seqlen or a longer text."
        )
    return torch.tensor(ids[: count * seqlen], dtype=torch.long).view(count, seqlen)[:limit]
