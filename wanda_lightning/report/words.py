"""Numbers as words, for pages."""

from __future__ import annotations

from math import isfinite


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


def metric_name(metric: str) -> str:
    """Return the name of a metric at the start of a sentence.

    >>> metric_name("top-1"), metric_name("perplexity")
    ('Top-1 accuracy', 'Perplexity')
    """
    return "Top-1 accuracy" if metric == "top-1" else metric.capitalize()


def result(metric: str, value: float | None) -> str:
    """Return a result of a model: a fraction as percent, or a perplexity.

    >>> result("top-1", 0.8125), result("perplexity", 16.058), result("perplexity", 12345.6), result("top-1", None)
    ('81.25%', '16.06', '12,345.60', 'not measured')
    >>> result("perplexity", float("inf"))
    'not finite'
    """
    if value is None or not isfinite(value):
        return "not measured" if value is None else "not finite"
    return f"{value:.2%}" if metric == "top-1" else f"{value:,.2f}"


def change(metric: str, before: float | None, after: float | None) -> str:
    """Return how a result changed: in points, or, for perplexity, in percent; empty if it is not known.

    >>> change("top-1", 0.9, 0.875), change("perplexity", 16.0, 20.0)
    ('-2.50 points', '+25.0%')
    """
    if before is None or after is None or not isfinite(before + after) or not before:
        return ""
    return f"{100 * (after - before):+.2f} points" if metric == "top-1" else f"{after / before - 1:+.1%}"


def continuation(text: str) -> str:
    r"""Return what a model wrote after a prompt, without the space or the line break that joins it to the prompt.

    >>> continuation(" is open.\n"), continuation("\n    return 1\n")
    ('is open.', '    return 1')
    """
    return text.strip("\n") if text.startswith("\n") else text.strip()
