"""Text that a language model writes after prompts."""

import warnings
from typing import Any

import torch

from wanda_lightning.common.evaluation_mode import evaluating
from wanda_lightning.common.wording import one_line

PROMPTS = ("The capital of France is", "To make a good cup of tea, first", "def is_prime(n):")
_NEW_TOKENS = 40


def continuations(model: Any, tokenizer: Any) -> list[str]:
    """Continue each prompt; warn, and return nothing, if the model cannot generate text."""
    try:
        with evaluating(model):
            return [continuation(model, tokenizer, prompt) for prompt in PROMPTS]
    except Exception as error:  # code of the model, whose errors must not end a run that has pruned
        name = type(model).__name__
        warnings.warn(
            f"{name} cannot continue a prompt, so no text is shown: {one_line(error)}", stacklevel=2
        )
        return []


def continuation(model: Any, tokenizer: Any, prompt: str) -> str:
    """Return the most likely tokens after a prompt, at most 40 and as many as fit into the model's context."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    length = ids.shape[1]
    context = getattr(model.config.get_text_config(), "max_position_embeddings", 0)
    new_tokens = min(_NEW_TOKENS, context - length) if context else _NEW_TOKENS

    # transformers warns if there is no padding token, although one prompt needs no padding.
    padding = tokenizer.pad_token_id
    if padding is None:
        padding = tokenizer.eos_token_id or 0

    (tokens,) = model.generate(
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
    return tokenizer.decode(tokens[length:], skip_special_tokens=True)
