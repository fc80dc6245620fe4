"""Check the length of windows against the context of a model."""

from __future__ import annotations

from typing import Any

from wanda_lightning.model_sources import load_config


def refuse_long_windows(seqlen: int | None, model: str, hub: dict[str, Any]) -> None:
    """Refuse windows that are longer than the model's context, before its weights are loaded.

    Args:
        seqlen: Tokens in a window, if given.
        model: Hub id, folder or .gguf file.
        hub: Options of `from_pretrained`.

    Raises:
        ValueError: Names the option and what is allowed.
        OSError: If neither a folder nor the hub has the model.
    """
    if seqlen is not None:
        checked_seqlen(seqlen, load_config(model, **hub), seqlen)


def checked_seqlen(seqlen: int | None, config: Any, default: int) -> int:
    """Tokens in a window: as asked for, else the model's context, at most `default`.

    Raises:
        ValueError: If the model cannot read so many tokens at once.
    """
    context = _context(config) or default
    if seqlen is not None and seqlen > context:
        raise ValueError(f"--seqlen must be at most {context}, the model's context, but it is {seqlen}.")
    return min(default, context) if seqlen is None else seqlen


def _context(config: Any) -> int:
    return int(getattr(config.get_text_config(), "max_position_embeddings", 0) or 0)
