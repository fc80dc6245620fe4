"""Put numbers, sizes, names and errors into words."""

import difflib
from collections.abc import Iterable, Sequence


def duration(seconds: float) -> str:
    """Return a duration, such as `7.2 s`, `3 min 12 s` or `2 h 5 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def abbreviated(number: int, names: Sequence[str] = (" billion", " million", " thousand")) -> str:
    """Return a large number with three digits, such as `135 million`."""
    for unit, name in zip((1e9, 1e6, 1e3), names, strict=True):
        if number >= unit:
            three_digits = float(f"{number / unit:.3g}")
            return f"{three_digits:g}{name}"  # 1000, where `.3g` has 1e+03
    return str(number)


def quantity(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun, such as `1 layer` or `210 layers`."""
    if number != 1:
        noun = plural or f"{noun}s"
    return f"{number:,} {noun}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean ...?` with the known names that resemble `name`, or an empty string if none does.

    A known name may be longer, as `vit_tiny_patch16_224` is for `vit_tinyy`: only its start is compared.
    """
    if not name:
        return ""
    longest_first = sorted(known, key=lambda text: (len(text), text), reverse=True)
    shortest = {candidate[: len(name)]: candidate for candidate in longest_first}
    starts = difflib.get_close_matches(name.lower(), shortest, n=3, cutoff=0.75)
    if not starts:
        return ""
    names = " or ".join(shortest[start] for start in starts)
    return f" Did you mean {names}?"


def one_line(error: BaseException) -> str:
    """Return the message of an error from another library on one line."""
    return " ".join(str(error).split())
