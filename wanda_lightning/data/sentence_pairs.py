"""Sentences to calibrate on, cut from texts, and pairs of sentences with a score of their similarity."""

import csv
import os
import random
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import chain
from math import isfinite
from pathlib import Path
from typing import Any

from wanda_lightning.common.errors import UserError
from wanda_lightning.data.dataset_files import load
from wanda_lightning.data.text_sources import Texts

Pair = tuple[str, str, float]

STSB = "stsb"
_ON_HUB = "sentence-transformers/stsb"
_COLUMNS = ("sentence1", "sentence2", "score")
_FEWEST_WORDS = 5  # shorter ones are mostly headings
_DRAWN_FROM = 8  # times as many sentences
_SHORTEST = 4  # words of a piece
_LONGEST = 14


def check_pairs(source: str, option: str) -> None:
    """Raise an error unless a source is `stsb` or an existing .csv file, without reading it; it names the option."""
    is_file = source.endswith(".csv") and os.path.isfile(os.path.expanduser(source))
    if source != STSB and not is_file:
        raise UserError(
            f"{option} must be {STSB} or an existing .csv file with two sentences and a score in each line, but it is "
            f"{source!r:.80}."
        )


def read_pairs(source: str, split: str, cache_dir: str | None = None) -> list[Pair]:
    """Return the pairs of a .csv file, or of a split of STS-B on the hub, with scores of at most 1.

    If a score is above 1, as in STS-B's own scale from 0 to 5, all are divided by the largest.
    """
    if source == STSB:
        rows = load(_ON_HUB, split=split, cache_dir=cache_dir)
        pairs = list(zip(*(rows[column] for column in _COLUMNS), strict=True))
    else:
        pairs = _pairs_in_file(source)
    largest = max(1.0, *(score for *_, score in pairs))
    return [(first, second, score / largest) for first, second, score in pairs]


def _pairs_in_file(source: str) -> list[Pair]:
    # utf-8-sig reads a file with or without a byte order mark.
    with Path(source).expanduser().open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        names = reader.fieldnames or ()
        columns = _COLUMNS if set(_COLUMNS) <= set(names) else names
        if len(columns) != len(_COLUMNS):
            raise UserError(
                f"{source} must have the columns {', '.join(_COLUMNS)}, or three columns in this order, but it has "
                f"{', '.join(names) or 'none'}."
            )
        pairs = [_pair(row, columns, f"Line {reader.line_num} of {source}") for row in reader]
    if not pairs:
        raise UserError(f"{source} must have pairs of sentences, but it has only a heading.")
    return pairs


def _pair(row: Mapping[str, Any], columns: Sequence[str], place: str) -> Pair:
    first, second, text = (row[column] for column in columns)
    try:
        score = float(text)
    except (TypeError, ValueError):  # None: the line is too short
        score = float("nan")
    if not isfinite(score):
        raise UserError(f"{place} must have a number as its {columns[-1]}, but it has {text!r}.")
    return first, second, score


def draw_sentences(texts: Texts, count: int, seed: int) -> list[str]:
    """Draw different sentences from one text or from documents, or all if there are fewer; a seed gives the same ones.

    Documents are read in an order that the seed gives, until they have eight times as many sentences.
    """
    documents = [texts] if isinstance(texts, str) else texts
    generator = random.Random(seed)
    sentences: dict[str, None] = {}
    for index in generator.sample(range(len(documents)), len(documents)):
        sentences |= dict.fromkeys(split_sentences(documents[index]))
        if len(sentences) >= _DRAWN_FROM * count:
            break
    return generator.sample(list(sentences), min(count, len(sentences)))


def draw_pieces(texts: Texts, count: int, seed: int, together: int) -> list[str]:
    """Draw pieces of 4 to 14 words from anywhere in one text or in documents; a seed gives the same ones.

    There are far more of them than sentences in a text. The pieces of each `together` have equally many words, so that
    a batch of them has little padding. Documents of fewer than 14 words are passed over; without any other, there are
    no pieces.
    """
    documents = [texts] if isinstance(texts, str) else texts
    generator = random.Random(seed)
    words_of = lru_cache(maxsize=16)(lambda index: documents[index].split())
    long_enough = [index for index, text in enumerate(documents) if _has_words(text, _LONGEST)]
    pieces: list[str] = []
    while long_enough and len(pieces) < count:
        length = generator.randint(_SHORTEST, _LONGEST)
        for _ in range(min(together, count - len(pieces))):
            words = words_of(generator.choice(long_enough))
            start = generator.randint(0, len(words) - length)
            pieces.append(" ".join(words[start : start + length]))
    return pieces


def _has_words(text: str, count: int) -> bool:
    """Return whether a text has at least so many words, without reading much more of it."""
    return len(text.split(maxsplit=count - 1)) == count


def split_sentences(text: str) -> list[str]:
    r"""Cut a text into sentences of at least five words, after the marks at their ends and at blank lines.

    >>> split_sentences("Title\n\nOne sentence of\nsix words. Too short! Is this one long enough?")
    ['One sentence of six words.', 'Is this one long enough?']
    """
    # Within a paragraph, a line may end anywhere.
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    parts = chain.from_iterable(re.split(r"(?<=[.!?])\s", paragraph) for paragraph in paragraphs)
    return [part for part in parts if len(part.split()) >= _FEWEST_WORDS]
