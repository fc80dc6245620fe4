"""Models that read texts themselves, as those of sentence-transformers do; their methods show it, without an import."""

from collections.abc import Mapping, Sequence
from typing import Any

SENTENCES = 32  # in a batch


def reads_texts(model: object) -> bool:
    """Whether a model tokenizes texts. Its forward then takes all features of a batch as one mapping."""
    return callable(getattr(model, "tokenize", None))


def text_features(model: Any, texts: Sequence[str]) -> Mapping[str, Any]:
    """Return a batch as `encode` makes it: with the default prompt, padded, and cut at the model's longest length."""
    prompt = ""
    if getattr(model, "default_prompt_name", None):
        prompt = model.prompts.get(model.default_prompt_name, "")
    return model.preprocess([*texts], prompt=prompt)


def as_encoded(model: object, output: Any) -> Any:
    """Return an output whose embeddings, if it has some, are cut at the model's `truncate_dim`, as by `encode`."""
    width = getattr(model, "truncate_dim", None)
    if width is None:
        return output
    return {**output, "sentence_embedding": output["sentence_embedding"][..., :width]}
