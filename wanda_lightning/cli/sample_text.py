"""Text by a language model after prompts: to read, and to count how often the model falls into a loop."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from wanda_lightning.common.evaluation_mode import evaluating
from wanda_lightning.common.wording import one_line
from wanda_lightning.evaluation.results import Metrics

PROMPTS = ("The capital of France is", "To make a good cup of tea, first", "def is_prime(n):")
_NEW_TOKENS = 40
_REPETITIONS = 3  # of an n-gram that make a loop
_LOOP_LENGTH = 8  # tokens, at least
_LOOP_PROMPTS = 32
_LOOP_PROMPT_TOKENS = 32
_LOOP_NEW_TOKENS = 64

_Result = TypeVar("_Result")


def continuations(model: Any, tokenizer: Any) -> list[str]:
    """Continue each prompt; warn, and return nothing, if the model cannot generate text."""

    def write() -> list[str]:
        return [continuation(model, tokenizer, prompt) for prompt in PROMPTS]

    return _generated(model, write, [], "no text is shown")


def _generated(
    model: Any, generate: Callable[[], _Result], default: _Result, otherwise: str
) -> _Result:
    """Return what a model writes; warn, with the words for what is missing then, and return a default if it cannot."""
    try:
        with evaluating(model):
            return generate()
    except Exception as error:  # code of the model, whose errors must not end a run that has pruned
        name = type(model).__name__
        warnings.warn(
            f"{name} cannot continue a prompt, so {otherwise}: {one_line(error)}",
            stacklevel=3,
        )
        return default


def continuation(model: Any, tokenizer: Any, prompt: str) -> str:
    """Return the most likely tokens after a prompt, at most 40 and as many as fit into the model's context."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    tokens = _most_likely(model, tokenizer, ids, _NEW_TOKENS)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


def measure_loops(model: Any, tokenizer: Any, windows: Tensor) -> Metrics:
    """Return the share of continuations that end in a loop, and the number of prompts.

    The prompts are the first 32 tokens of at most 32 windows, and the continuations the 64 most likely tokens. A
    continuation that ends by itself is no loop. Warn, and return nothing, if the model cannot generate text.
    """
    prompts = windows[:_LOOP_PROMPTS, :_LOOP_PROMPT_TOKENS]

    def count() -> Metrics:
        ends = model.generation_config.eos_token_id
        ends = {*ends} if isinstance(ends, list) else {ends}
        rows = _most_likely(model, tokenizer, prompts, _LOOP_NEW_TOKENS)
        loops = [row for row in rows if ends.isdisjoint(row) and ends_in_a_loop(row)]
        return {"in_a_loop": len(loops) / len(rows), "prompts": len(rows)}

    return _generated(model, count, {}, "loops are not counted")


def ends_in_a_loop(tokens: Sequence[int]) -> bool:
    """Return whether tokens end with the same n-gram three times in a row or more, over eight tokens at least.

    Shorter repetitions are ordinary text, such as `...` or `1000`.

    >>> ends_in_a_loop([5, 1, 2, 1, 2, 1, 2, 1, 2])
    True
    >>> ends_in_a_loop([1, 2, 1, 2, 1, 2])
    False
    """
    for n in range(1, len(tokens) // _REPETITIONS + 1):
        length = max(n * _REPETITIONS, _LOOP_LENGTH)
        end = [*tokens[-length:]]
        if len(end) == length and end[n:] == end[:-n]:
            return True
    return False


def _most_likely(model: Any, tokenizer: Any, ids: Tensor, new_tokens: int) -> list[list[int]]:
    """Return the most likely tokens after each prompt; after the token that ends a text, padding."""
    length = ids.shape[1]
    context = getattr(model.config.get_text_config(), "max_position_embeddings", 0)
    if context:
        new_tokens = min(new_tokens, context - length)

    # transformers warns if there is no padding token, although prompts of one length need no padding.
    padding = tokenizer.pad_token_id
    if padding is None:
        padding = tokenizer.eos_token_id or 0

    generated = model.generate(
        ids.to(model.device),
        attention_mask=torch.ones_like(ids).to(model.device),
        max_new_tokens=new_tokens,
        pad_token_id=padding,
        do_sample=False,
        # The model's generation_config may say otherwise.
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        # transformers warns about options of sampling, which have no effect.
        temperature=None,
        top_p=None,
        top_k=None,
    )
    return [row[length:].tolist() for row in generated]
