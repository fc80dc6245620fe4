"""What the commands make of options that a shell can only give as strings."""

from __future__ import annotations

import re
from collections.abc import Sequence

from wanda_lightning.modules import CausalLMModule

TIMM = "timm:"  # before the name of an image classifier


def as_patterns(given: str | Sequence[str]) -> list[str]:
    """Patterns from a command line, where several may stand in one string.

    Example:
        >>> as_patterns("lm_head, *.down_proj")
        ['lm_head', '*.down_proj']
    """
    return [part.strip() for part in given.split(",") if part.strip()] if isinstance(given, str) else list(given)


def as_pattern(sparsity_type: str) -> str:
    """The pattern that `--sparsity_type` names.

    Raises:
        ValueError: If it names none.
    """
    if sparsity_type != "unstructured" and not re.fullmatch(r"\d+:\d+", sparsity_type):
        raise ValueError(f"--sparsity_type is unstructured or N:M such as 2:4, but {sparsity_type} was given")
    return sparsity_type


def checked_seqlen(seqlen: int | None, module: CausalLMModule, default: int) -> int:
    """Tokens in a window: as asked for, else the model's context, at most `default`.

    Raises:
        ValueError: If the model cannot read so many at once.
    """
    context = int(getattr(module.model.config.get_text_config(), "max_position_embeddings", default))
    if seqlen is not None and seqlen > context:
        raise ValueError(f"--seqlen {seqlen} is more than the model can read at once: give at most {context}")
    return min(default, context) if seqlen is None else seqlen


def refuse_given(kind: str, **options: object) -> None:
    """Refuse options that were given, though they say nothing about this kind of model.

    Raises:
        ValueError: Naming them all.
    """
    given = [f"--{name}" for name, value in options.items() if value is not None]
    if given:
        raise ValueError(f"{', '.join(given)} has no meaning for {kind}: leave it out")
