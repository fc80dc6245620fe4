"""What the commands make of options that a shell can only give as strings."""

from __future__ import annotations

from collections.abc import Sequence


def as_patterns(skip: str | Sequence[str]) -> list[str]:
    """Patterns from a command line, where several may stand in one string.

    Example:
        >>> as_patterns("lm_head, *.down_proj")
        ['lm_head', '*.down_proj']
    """
    return [part.strip() for part in skip.split(",") if part.strip()] if isinstance(skip, str) else list(skip)
