"""Text that a language model writes itself, for calibration without any data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wanda_lightning.checks import check_at_least, check_positive
from wanda_lightning.progress import ProgressBar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MESSAGE = "\N{OBJECT REPLACEMENT CHARACTER}"  # stands for the message of the user; no template has this character


def sample_windows(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    seqlen: int,
    *,
    chat: bool = False,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = True,
) -> Tensor:
    """Sample windows of text from a causal language model.

    Each window begins with what the model writes after the token that begins a text. Tokens are drawn from the model's
    predictions, without temperature or truncation. Where a text ends within a window, the next one follows. The time
    is about that of `seqlen` forward passes of one token for each batch of windows.

    With `chat`, each window begins with what the tokenizer's chat template puts before a first message of the user, so
    that a model trained on this template writes the message, as in Magpie (Xu et al. 2024), and then goes on with the
    template and its answer. These tokens are part of the window, since the model sees them in use.

    Args:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer, which knows the token that begins a text, or else the one that ends a text; with
            `chat`, one with a chat template.
        count: Number of windows.
        seqlen: Number of tokens in a window.
        chat: Write a chat instead of a text.
        seed: Seed of the draws; the global random state does not change.
        batch_size: Number of windows that are written together.
        progress: Show a bar.

    Returns:
        Token ids of shape (count, seqlen), int64, on the CPU.

    Raises:
        ValueError: If the model cannot write text, no token begins or ends a text, or the tokenizer has no chat
            template, or one that begins with as many tokens as a window has.
    """
    check_positive(count=count, batch_size=batch_size)
    check_at_least(2, seqlen=seqlen)
    if not callable(getattr(model, "generate", None)):
        raise ValueError(
            f"calibration='self' and 'self-chat' need a language model of transformers, which can write text, but "
            f"{type(model).__name__} has no method generate. Give a text."
        )
    start = beginning(tokenizer, chat)
    kept = len(start) if chat else 0  # tokens that are part of the window
    if kept >= seqlen:
        raise ValueError(
            f"seqlen must be larger than {kept}, the number of tokens with which the chat template begins, but it is "
            f"{seqlen}. Use longer windows, or calibration='self'."
        )
    sizes = [min(batch_size, count - done) for done in range(0, count, batch_size)]
    windows = []
    with (
        torch.inference_mode(False),  # or training on the windows would fail
        torch.random.fork_rng(devices=_cuda_devices(model)),
        _sampling(model),
        ProgressBar("Writing text", len(sizes) * (seqlen - kept), progress) as bar,
    ):
        torch.manual_seed(seed)
        for size in sizes:
            first = torch.tensor([start] * size, device=model.device)
            written = model.generate(
                first,
                attention_mask=torch.ones_like(first),
                do_sample=True,
                top_k=0,
                max_new_tokens=seqlen - kept,
                streamer=_Advancing(bar),
            )
            windows.append(written[:, -seqlen:].cpu())
    return torch.cat(windows)


def beginning(tokenizer: PreTrainedTokenizerBase, chat: bool) -> list[int]:
    """Return the tokens after which the model writes a text, or the first message of a chat.

    Raises:
        ValueError: If the tokenizer has neither a token that begins nor one that ends a text; with `chat`, if it has
            no chat template, or one that does not contain the message.
    """
    if chat:
        return _beginning_of_chat(tokenizer)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise ValueError(
            "calibration='self' needs a tokenizer with a token that begins or ends a text, but this one has neither. "
            "Set its bos_token, or give a text."
        )
    return [int(start)]


def _beginning_of_chat(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    advice = "Use the tokenizer of a model that is trained on chats, or calibration='self'."
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            f"calibration='self-chat' needs a tokenizer with a chat template, but this one has none. {advice}"
        )
    text = str(tokenizer.apply_chat_template([{"role": "user", "content": _MESSAGE}], tokenize=False))
    before, message, _ = text.partition(_MESSAGE)
    ids: list[int] = tokenizer(before, add_special_tokens=False).input_ids
    if not message or not ids:
        raise ValueError(
            "calibration='self-chat' needs a chat template that begins the turn of the user and contains the message, "
            f"but this one makes {text!r} of the message {_MESSAGE!r}. {advice}"
        )
    return ids


def _cuda_devices(model: Any) -> list[torch.device]:
    return [model.device] if model.device.type == "cuda" else []


@contextmanager
def _sampling(model: Any) -> Iterator[None]:
    """Sample plainly: without the model's own settings, among them the token that ends a text and so the window."""
    from transformers import GenerationConfig

    own, was_training = model.generation_config, model.training
    model.generation_config = GenerationConfig()
    model.eval()
    try:
        yield
    finally:
        model.generation_config = own
        model.train(was_training)


class _Advancing:
    """Advances a bar for each token."""

    def __init__(self, bar: ProgressBar) -> None:
        self._bar, self._has_begun = bar, False

    def put(self, tokens: Tensor) -> None:
        """Count a token of each window; the first call brings what was given."""
        if self._has_begun:
            self._bar.advance()
        self._has_begun = True

    def end(self) -> None:
        """End the text."""
