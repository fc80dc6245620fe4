"""Texts by name, from a file, from the hub or in memory, split for calibration and evaluation."""

import os
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from wanda_lightning.common.checks import require_extra
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.wording import did_you_mean
from wanda_lightning.data.chats import Chats, chats_in_jsonl, is_chat
from wanda_lightning.data.dataset_files import EXTENSIONS, is_hub_id, load

SELF = "self"  # the name of the text that the model itself writes
OWN_TEXT = "text by the dense model"  # the same in descriptions

_NAMES = ("c4", "wikitext2", "python-docs", "sklearn-docs")
_IN_MEMORY = "texts in memory"
# The first of these that a data set on the hub has.
_HUB_SPLITS = {"calibration": ("train",), "evaluation": ("validation", "test", "train")}
_WIKITEXT2_SPLIT = {"calibration": "train", "evaluation": "test"}
# Of the many files of each split, the reference code reads one.
_C4_FILE = {
    "calibration": {"train": "en/c4-train.00000-of-01024.json.gz"},
    "evaluation": {"validation": "en/c4-validation.00000-of-00008.json.gz"},
}
_C4_EVALUATION_DOCUMENTS = 1100
_EVALUATION_FRACTION = 0.3  # of the characters of python-docs
_QUOTATION = 80  # characters: a shorter paragraph may be the same in two topics by chance

Texts = str | Sequence[str]
"""One text, or several documents."""


def check_source(source: str, option: str = "text") -> None:
    """Raise an error unless a source is a known name, a hub id or a file of a known format; it names the option."""
    if source == "sklearn-docs":
        require_extra("demo", "sklearn", purpose="The descriptions of scikit-learn's data sets")
    path = os.path.expanduser(source)
    has_extension = Path(path).suffix in EXTENSIONS
    if has_extension and not os.path.exists(path):
        raise UserError(
            f"{option} must be an existing file, but there is no {source}. Check the path."
        )
    if not (source in _NAMES or has_extension or is_hub_id(source)):
        documents = "[[text]]" if option == "evaluation" else "[text]"
        own_text = f" Put a text of your own in a file, or in Python in a list: {documents}."
        raise UserError(
            f"{option} must be one of {', '.join(_NAMES)}, the id of a hub data set (OWNER/NAME), an existing file "
            f"that ends in {', '.join(EXTENSIONS)}, or a list of documents, but it is {source!r:.80}."
            f"{did_you_mean(source, _NAMES) or own_text}"
        )


def documents_in(texts: Any, option: str) -> Sequence[str] | Chats:
    """Return a list of strings as it is, the column `text` of a data set, or the chats in rows with `messages`.

    Errors begin with the option.
    """
    if hasattr(texts, "column_names"):  # a datasets.Dataset
        if is_chat(texts.features):
            return Chats(texts, option, is_table=True)
        kind = getattr(texts.features.get("text"), "dtype", "missing")
        wrong = "" if kind in ("string", "large_string") else f"'text' is {kind}"
        if not wrong and texts.data.column("text").null_count:
            wrong = f"row {1 + [*texts['text']].index(None)} has no text"
        if wrong:
            raise UserError(
                f"{option} must have a column 'text' with a string in each row, or 'messages', but it has the columns "
                f"{', '.join(texts.column_names)}, and {wrong}."
            )
        return texts["text"]
    if isinstance(texts, list | tuple):
        if all(isinstance(text, str) for text in texts):
            return texts
        if is_chat(texts[0]):
            return Chats(texts, _IN_MEMORY)
    raise UserError(
        f"{option} must be the name of a text, a list of strings or a datasets.Dataset, or a list of rows with "
        f"messages, but it is {texts!r:.200}."
    )


def split_sources(texts: Any) -> list[Any]:
    """Return each of several sources: names with commas, or a list of which each item is a source of its own."""
    if isinstance(texts, str):
        # `Path.exists` raises an error for names that are too long.
        is_path = os.path.exists(os.path.expanduser(texts))
        return [texts] if is_path else [*map(str.strip, texts.split(","))]
    if isinstance(texts, list | tuple) and texts and all(map(_is_source, texts)):
        return [*texts]
    return [texts]


def _is_source(item: object) -> bool:
    """Whether an item of a list is a source, and not a document."""
    if isinstance(item, str):
        return item in (*_NAMES, SELF) or item.endswith(EXTENSIONS) or is_hub_id(item)
    return isinstance(item, os.PathLike | list | tuple) or hasattr(item, "column_names")


def named(texts: Any, option: str) -> tuple[str, Any]:
    """Return the name of a text, a list of strings or a data set, and its source; raise an error for anything else."""
    if not isinstance(texts, str | os.PathLike):
        documents_in(texts, option)
        info = getattr(texts, "info", None)
        return getattr(info, "dataset_name", None) or _IN_MEMORY, texts
    name = os.fspath(texts)
    if name != SELF or option == "evaluation":
        check_source(name, option)
    return name, name


def calibration_source(source: Any, cache_dir: str | None = None) -> Texts | Chats:
    """Return one text, or a sequence of documents or chats, from which calibration windows are drawn."""
    content = _read(source, "calibration", cache_dir)
    if source == "wikitext2" and not isinstance(content, Chats):
        return " ".join(content)
    return content


def evaluation_text(source: Any, cache_dir: str | None = None) -> str | Chats:
    """Return the text, or the chats, on which perplexity is measured."""
    content = _read(source, "evaluation", cache_dir)
    if isinstance(content, str | Chats):
        return content
    if source == "c4":
        return " ".join(content[:_C4_EVALUATION_DOCUMENTS])
    return "\n\n".join(content)


def _read(source: Any, purpose: str, cache_dir: str | None) -> Texts | Chats:
    """Return the text, the documents or the chats for "calibration" or "evaluation"."""
    try:
        return _content(source, purpose, cache_dir)
    except OSError as error:
        if source not in ("c4", "wikitext2"):
            raise
        raise OSError(
            f"{str(error).rstrip('.')}. Without a network, use --{purpose} python-docs (in Python, "
            f"{purpose}='python-docs') or a file."
        ) from error.__cause__


def _content(source: Any, purpose: str, cache_dir: str | None) -> Texts | Chats:
    if not isinstance(source, str):
        return documents_in(source, _IN_MEMORY)
    if source == "python-docs":
        return "\n\n".join(python_docs()[purpose].values())
    if source == "sklearn-docs":
        return sklearn_docs()
    if source == "wikitext2":
        name = "wikitext-2-raw-v1"
        split = _WIKITEXT2_SPLIT[purpose]
        return load("Salesforce/wikitext", name, split=split, cache_dir=cache_dir)["text"]
    if source == "c4":
        (split,) = _C4_FILE[purpose]
        return load(
            "allenai/c4",
            split=split,
            cache_dir=cache_dir,
            data_files=_C4_FILE[purpose],
            # Else datasets raises ExpectedMoreSplits, since one file is not all of C4.
            verification_mode="no_checks",
        )["text"]

    if source.endswith(".jsonl"):
        chats = chats_in_jsonl(source)
        if chats is not None:
            return chats
    data = load(source, cache_dir=cache_dir)
    if source.endswith(".txt"):
        text: str = data["text"][0]
        return text
    if Path(source).suffix in EXTENSIONS:
        return documents_in(data, source)
    usual = [split for split in _HUB_SPLITS[purpose] if split in data]
    return documents_in(data[[*usual, *data][0]], source)


def python_docs() -> dict[str, dict[str, str]]:
    """Divide the topics of Python's language reference (`help("topics")`) into "calibration" and "evaluation".

    The reference has about 465 kB in 79 topics. Calibration gets 70 % of the characters, and one version of Python
    always gives the same split. Many topics quote others ("specialnames" contains "customization"), so topics that
    share a paragraph of 80 characters or more are in the same part.
    """
    from pydoc_data.topics import topics

    def size(names: list[str]) -> int:
        return sum(len(topics[name]) for name in names)

    parts: dict[str, list[str]] = {"calibration": [], "evaluation": []}
    # The largest group first, so that the small ones at the end even the sizes out.
    for group in sorted(_quoting_groups(topics), key=lambda names: (-size(names), names)):
        # Add to the part that is further behind its fraction.
        evaluated = size(parts["evaluation"]) * (1 - _EVALUATION_FRACTION)
        is_behind = evaluated < size(parts["calibration"]) * _EVALUATION_FRACTION
        parts["evaluation" if is_behind else "calibration"] += group
    return {part: {name: topics[name] for name in sorted(names)} for part, names in parts.items()}


def sklearn_docs() -> str:
    """Return the descriptions of scikit-learn's data sets: 14 texts with 43 kB, unrelated to Python's reference."""
    descriptions = Path(str(files("sklearn.datasets.descr"))).glob("*.rst")
    return "\n\n".join(path.read_text(encoding="utf-8") for path in sorted(descriptions))


def _quoting_groups(topics: Mapping[str, str]) -> list[list[str]]:
    """Group the topics that share a paragraph, directly or through others."""
    groups: dict[tuple[str, ...], set[str]] = {}  # the paragraphs of each group
    for name in sorted(topics):
        names = [name]
        split = map(str.strip, topics[name].split("\n\n"))
        paragraphs = {paragraph for paragraph in split if len(paragraph) >= _QUOTATION}
        for others in list(groups):
            if not paragraphs.isdisjoint(groups[others]):
                names.extend(others)
                paragraphs |= groups.pop(others)
        groups[tuple(names)] = paragraphs
    return [sorted(names) for names in groups]
