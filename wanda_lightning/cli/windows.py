"""Check texts and the length of windows, before the model is loaded where its configuration tells."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from wanda_lightning.data.text_sources import check_source


def refuse_early(seqlen: int | None, model: str, hub: dict[str, Any], *texts: str) -> None:
    """Refuse texts that do not exist, and windows that are longer than the model's context.

    Args:
        seqlen: Tokens in a window, if given.
        model: Hub id, folder or .gguf file.
        hub: Options of `from_pretrained`.
        texts: Names or files.

    Raises:
        ValueError: Names the option and what is allowed.
        FileNotFoundError: If a file does not exist.
    """
    for text in texts:
        check_source(text)
    if seqlen is not None and (config := _config(model, hub)) is not None:
        checked_seqlen(seqlen, config, seqlen)


def _config(model: str, hub: dict[str, Any]) -> Any:
    """The configuration; None if it cannot be read, since loading the model explains that better."""
    path = Path(model)
    source = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    with suppress(Exception):
        return AutoConfig.from_pretrained(str(path.parent) if source else model, **source, **hub)
    return None


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
