"""Models that read texts themselves, as those of sentence-transformers do; their methods show it, without an import."""

from collections.abc import Mapping, Sequence
from typing import Any

SENTENCES = 32  # in a batch


def reads_texts(model: object) -> bool:
    """Whether a model tokenizes texts. Its forward then takes all features of a batch as one mapping."""
    return callable(getattr(model, "tokenize", None))


def text_features(model: Any, texts: Sequence[str]) -> Mapping[str, Any]:
    """Return a batch for a model that reads texts: padded, and cut at the longest length of the model."""
    # sentence-transformers 6 has another name for it, and warns of the old one.
    tokenize = getattr(model, "preprocess", None) or model.tokenize
    return tokenize([*texts])
