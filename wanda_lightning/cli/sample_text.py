"""Text by a language model after a few prompts, for the page of a report."""

import warnings
from typing import Any

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
            f"{name} cannot continue a prompt, so the report has no text: {one_line(error)}",
            stacklevel=2,
        )
        return []


def continuation(model: Any, tokenizer: Any, prompt: str) -> str:
    """Return the most likely tokens after a prompt, at most 40 and as many as fit into the model's context."""
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    length = inputs.input_ids.shape[1]
    new_tokens = _NEW_TOKENS
    context = getattr(model.config.get_text_config(), "max_position_embeddings", 0)
    if context:
        new_tokens = min(new_tokens, context - length)

    # transformers warns if there is no padding token, although a single prompt needs no padding.
    padding = tokenizer.pad_token_id
    if padding is None:
        padding = tokenizer.eos_token_id or 0

    generated = model.generate(
        **inputs,
        max_new_tokens=new_tokens,
        pad_token_id=padding,
        do_sample=False,
        # Those of the model's generation_config, which have no effect now, would be warned about.
        temperature=None,
        top_p=None,
        top_k=None,
    )
    return tokenizer.decode(generated[0, length:], skip_special_tokens=True)
