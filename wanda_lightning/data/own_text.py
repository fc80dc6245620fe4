"""Text that a language model writes itself, for calibration without any data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor

from wanda_lightning.common.errors import UserError
from wanda_lightning.common.evaluation_mode import evaluating, seeded
from wanda_lightning.common.progress import ProgressBar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def sample_windows(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    seqlen: int,
    *,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = True,
) -> Tensor:
    """Sample windows of text from a causal language model.

    Each window begins with what the model writes after the token that begins a text. Tokens are drawn from the model's
    predictions, without temperature or truncation. Where a text ends within a window, the next one follows.

    Args:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer, which knows the token that begins a text, or else the one that ends a text.
        count: Number of windows.
        seqlen: Number of tokens in a window.
        seed: Seed of the draws; the global random state does not change.
        batch_size: Number of windows that are written together.
        progress: Show a bar.

    Returns:
        Token ids of shape (count, seqlen), int64, on the CPU.

    Raises:
        ValueError: If no token begins or ends a text.
    """
    from transformers import GenerationConfig

    start = tokenizer.bos_token_id
    if start is None:
        start = tokenizer.eos_token_id
    if start is None:
        raise UserError(
            "tokenizer must have a token that begins or ends a text. Set its bos_token, or give a text."
        )

    sizes = [min(batch_size, count - done) for done in range(0, count, batch_size)]
    windows = []
    with (
        torch.inference_mode(False),  # or training on the windows would fail
        seeded(seed, model.device),
        evaluating(model),
        # That of the model may end the text early, penalize repetitions or draw from the most likely tokens only.
        patch.object(model, "generation_config", GenerationConfig()),
        ProgressBar("Writing text", len(sizes), progress) as bar,
    ):
        for size in sizes:
            first = torch.full((size, 1), start, device=model.device)
            written = model.generate(
                first,
                attention_mask=torch.ones_like(first),
                do_sample=True,
                top_k=0,
                max_new_tokens=seqlen,
            )
            windows.append(written[:, -seqlen:].cpu())
            bar.advance()
    return torch.cat(windows)
