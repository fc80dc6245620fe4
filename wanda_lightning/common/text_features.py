"""Models that read texts themselves, as those of sentence-transformers do; their methods show it, without an import."""

from collections.abc import Mapping, Sequence
from typing import Any

SENTENCES = 32  # in a batch


def reads_texts(model: object) -> bool:
    """Whether a model tokenizes texts. Its forward then takes all features of a batch as one mapping."""
    return callable(getattr(model, "tokenize", None))


def text_features(model: Any, texts: Sequence[str]) -> Mapping[str, Any]:
    """Return a batch as `encode` makes it: with the default prompt, padded, and cut at the model's longest length."""
    prompts = getattr(model, "prompts", {})
    prompt = prompts.get(getattr(model, "default_prompt_name", None))
    # sentence-transformers 5.4 has another name for it, and warns of the old one.
    preprocess = getattr(model, "preprocess", None) or model.tokenize
    if not prompt:
        return preprocess([*texts])
    if hasattr(model, "preprocess"):
        return preprocess([*texts], prompt=prompt)
    features = preprocess([prompt + text for text in texts])
    # Pooling may leave out the tokens of the prompt. The prompt alone may end with a special token, too.
    ids = preprocess([prompt])["input_ids"][0].tolist()
    length = len(ids) - (ids[-1] in model.tokenizer.all_special_ids)
    return {**features, "prompt_length": length}


def as_encoded(model: object, output: Any) -> Any:
    """Return an output whose embeddings, if it has some, are cut at the model's `truncate_dim`, as by `encode`."""
    width = getattr(model, "truncate_dim", None)
    if width is None:
        return output
    return {**output, "sentence_embedding": output["sentence_embedding"][..., :width]}
