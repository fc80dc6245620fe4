"""Put numbers, sizes, names and errors into words, and match the names of layers with patterns."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Sequence

from wanda_lightning.common.errors import UserError


def duration(seconds: float) -> str:
    """Return a duration, such as `7.2 s`, `3 min 12 s` or `2 h 5 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def count(number: int, names: Sequence[str] = (" billion", " million", " thousand")) -> str:
    """Return a large number with three digits, such as `135 million`."""
    units = zip((1e9, 1e6, 1e3), names, strict=True)
    return next(
        (f"{float(f'{number / unit:.3g}'):g}{name}" for unit, name in units if number >= unit),
        str(number),
    )


def as_size(size: int) -> str:
    """Return a number of bytes in words, such as `98.8 MB`."""
    return count(size, (" GB", " MB", " KB")) if size >= 1000 else f"{size} bytes"


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun, such as `1 layer` or `210 layers`."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean ...?` with the known names that resemble `name`, or an empty string if none does.

    A known name may be longer, as `vit_tiny_patch16_224` is for `vit_tinyy`: only its start is compared.
    """
    starts: dict[str, str] = {}
    for candidate in sorted(known, key=lambda text: (len(text), text)):
        # The shortest of those that start alike.
        starts.setdefault(candidate[: len(name) or None], candidate)
    close = [
        starts[start] for start in difflib.get_close_matches(name.lower(), starts, n=3, cutoff=0.75)
    ]
    return f" Did you mean {' or '.join(close)}?" if close else ""


def one_line(error: BaseException) -> str:
    """Return the message of an error from another library on one line."""
    return " ".join(str(error).split())


def matches(name: str, pattern: str, option: str) -> bool:
    """Whether a pattern names a layer or a module that holds the layer.

    A pattern is a name, a glob, or `re:` and a regular expression that matches the whole name. If that is not a regular
    expression, the ValueError names `option`.
    """
    if pattern.startswith("re:"):
        try:
            return re.fullmatch(pattern[3:], name) is not None
        except re.error as error:
            raise UserError(
                f"{option}={pattern!r} must be a regular expression after 're:', but {error}."
            ) from error
    # A glob also matches everything inside: PEFT's adapters put the weight itself one level deeper.
    return name.startswith(f"{pattern}.") or any(
        fnmatch.fnmatchcase(name, p) for p in (pattern, f"{pattern}.*")
    )


def check_patterns(option: str, given: Iterable[str]) -> tuple[str, ...]:
    """Return the patterns of an option as a tuple, or raise a ValueError; a string is a single pattern."""
    patterns = (given,) if isinstance(given, str) else tuple(given)
    for pattern in patterns:
        matches("", pattern, option)
    return patterns


def refuse_unmatched(patterns: Sequence[str], names: Sequence[str], option: str, what: str) -> None:
    """Raise a ValueError with the nearest of the `names` if a pattern matches none; `what` says what they name."""
    for pattern in patterns:
        if not any(matches(name, pattern, option) for name in names):
            near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)
            nearest = f"the nearest is {near[0]!r}" if near else "the model has none"
            raise UserError(
                f"{option}={pattern!r} matches no {what} of the model; {nearest}. Give a name, a glob such as "
                "'*.down_proj', or 're:' and a regular expression."
            )
