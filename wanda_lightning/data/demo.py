"""Two small data sets that need no network: the Python documentation, and scanned digits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from wanda_lightning.checks import require_extra

_EVALUATION_FRACTION = 0.3  # of the characters of the documentation
_QUOTATION = 80  # characters: a shorter paragraph may be the same in two topics by chance


def python_docs() -> tuple[dict[str, str], dict[str, str]]:
    """Return the language reference that comes with Python (`help("topics")`), split for calibration and evaluation.

    It has about 465 kB in 79 topics: 70 % of the characters for calibration, 30 % for evaluation. One version of Python
    always gives the same split. Many topics quote others ("specialnames" contains "customization"), so topics that
    share a paragraph of 80 characters or more are in the same part.
    """
    from pydoc_data.topics import topics

    def size(names: Sequence[str]) -> int:
        return sum(len(topics[name]) for name in names)

    parts: tuple[list[str], list[str]] = [], []
    for group in sorted(_quoting_groups(topics), key=lambda names: (-size(names), names)):
        # Add to the part that is further behind its fraction.
        evaluation_next = size(parts[1]) * (1 - _EVALUATION_FRACTION) < size(parts[0]) * _EVALUATION_FRACTION
        parts[evaluation_next].extend(group)
    calibration, evaluation = ({name: topics[name] for name in sorted(part)} for part in parts)
    return calibration, evaluation


def _quoting_groups(topics: Mapping[str, str]) -> list[list[str]]:
    r"""Group the topics that share a paragraph, directly or through others.

    >>> _quoting_groups({"a": "x" * 80, "b": "y" * 80, "c": "z" * 80 + "\n\n" + "x" * 80})
    [['b'], ['a', 'c']]
    """
    groups: list[tuple[list[str], set[str]]] = []
    for name in sorted(topics):
        names, paragraphs = [name], {p.strip() for p in topics[name].split("\n\n") if len(p.strip()) >= _QUOTATION}
        disjoint = []
        for group in groups:
            if paragraphs.isdisjoint(group[1]):
                disjoint.append(group)
            else:
                names, paragraphs = group[0] + names, group[1] | paragraphs
        groups = [*disjoint, (names, paragraphs)]
    return [sorted(names) for names, _ in groups]


def check_digits() -> None:
    """Raise an ImportError if scikit-learn, which contains the digits, is not installed."""
    require_extra("demo", "sklearn", purpose="The digits")


def digits() -> tuple[list[tuple[Any, int]], list[tuple[Any, int]]]:
    """Return 1,797 scanned digits of 8x8 pixels (`sklearn.datasets.load_digits`), split for training and evaluation.

    Each is a pair of a PIL image and its label. The split is always the same: 80 % and 20 % of each class.
    """
    check_digits()
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    scans = load_digits()
    pixels = (scans.images * (255 / 16)).round().astype("uint8")
    samples = [(Image.fromarray(image), int(label)) for image, label in zip(pixels, scans.target, strict=True)]
    train, evaluation = train_test_split(samples, test_size=0.2, random_state=0, stratify=scans.target)
    return train, evaluation
