"""Numbers as words, for pages."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Return a duration.

    >>> duration(7.25), duration(192), duration(7500)
    ('7.2 s', '3 min 12 s', '2 h 5 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def count(number: int) -> str:
    """Return a large number with three digits.

    >>> count(134_515_008), count(950)
    ('135 million', '950')
    """
    for unit, name in ((1e9, " billion"), (1e6, " million"), (1e3, " thousand")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return str(number)


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun.

    >>> counted(1, "layer"), counted(210, "layer"), counted(2, "matrix", "matrices")
    ('1 layer', '210 layers', '2 matrices')
    """
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def continuation(text: str) -> str:
    r"""Return what a model wrote after a prompt, without the space or the line break that joins it to the prompt.

    >>> continuation(" is open.\n"), continuation("\n    return 1\n")
    ('is open.', '    return 1')
    """
    return text.strip("\n") if text.startswith("\n") else text.strip()
