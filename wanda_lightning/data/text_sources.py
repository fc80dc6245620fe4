"""Texts by name, from a file, from the hub or in memory, split for calibration and evaluation."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from wanda_lightning.common.checks import require_extra
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.wording import did_you_mean
from wanda_lightning.data.loading import EXTENSIONS, is_hub_id, load

SELF = "self"
OWN_TEXT = (
    "text by the dense model"  # the name of the text that the model itself writes, and in words
)

_NAMES = ("c4", "wikitext2", "python-docs", "sklearn-docs")
_IN_MEMORY = "texts in memory"
# For calibration and for evaluation: the first that exists.
_HUB_SPLITS = (
    ("train",),
    ("validation", "test", "train"),
)
_C4 = (
    ("train", "en/c4-train.00000-of-01024.json.gz"),
    ("validation", "en/c4-validation.00000-of-00008.json.gz"),
)
_C4_EVALUATION_DOCUMENTS = 1100
_EVALUATION_FRACTION = 0.3  # of the characters of python-docs
_QUOTATION = 80  # characters: a shorter paragraph may be the same in two topics by chance


def check_source(source: str, option: str = "text") -> None:
    """Raise an error unless a source is a known name, a hub id or a file of a known format; it names the option."""
    path = Path(source).expanduser()
    if source == "sklearn-docs":
        require_extra("demo", "sklearn", purpose="The descriptions of scikit-learn's data sets")
    if path.suffix in EXTENSIONS and not path.exists():
        raise UserError(
            f"{option} must be an existing file, but there is no {source}. Check the path."
        )
    if not (
        source in _NAMES or (path.suffix in EXTENSIONS and path.is_file()) or is_hub_id(source)
    ):
        raise UserError(
            f"{option} must be one of {', '.join(_NAMES)}, the id of a hub data set (OWNER/NAME), an existing file "
            f"that ends in {', '.join(EXTENSIONS)}, or a list of documents, but it is {source!r:.80}."
            f"{did_you_mean(source, _NAMES)}"
        )


def documents_in(texts: Any, option: str) -> Sequence[str]:
    """Return a list of strings as it is, or the column `text` of a data set; errors begin with the option."""
    if hasattr(texts, "column_names"):
        kind = getattr(texts.features.get("text"), "dtype", "missing")
        if kind not in ("string", "large_string") or texts.data.column("text").null_count:
            raise UserError(
                f"{option} must have a column 'text' with a string in each row, but it has the columns "
                f"{', '.join(texts.column_names)}, and 'text' is {kind} or not in each row."
            )
        return texts["text"]
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise UserError(
            f"{option} must be the name of a text, a list of strings or a datasets.Dataset, but it is {texts!r:.200}."
        )
    return texts


def named(texts: Any, option: str) -> tuple[str, Any]:
    """Return the name of a text, a list of strings or a data set, and its source; raise an error for anything else."""
    if not isinstance(texts, str | os.PathLike):
        documents_in(texts, option)
        return getattr(getattr(texts, "info", None), "dataset_name", None) or _IN_MEMORY, texts
    name = os.fspath(texts)
    if name != SELF or option == "evaluation":
        check_source(name, option)
    return name, name


def calibration_source(source: Any, cache_dir: str | None = None) -> str | Sequence[str]:
    """Return one text, or a sequence of documents, from which calibration windows are drawn."""
    content = _read(source, 0, cache_dir)
    return " ".join(content) if source == "wikitext2" else content


def evaluation_text(source: Any, cache_dir: str | None = None) -> str:
    """Return the text on which perplexity is measured."""
    content = _read(source, 1, cache_dir)
    if source == "c4":
        return " ".join(content[:_C4_EVALUATION_DOCUMENTS])
    return content if isinstance(content, str) else "\n\n".join(content)


def _read(source: Any, part: int, cache_dir: str | None) -> str | Sequence[str]:
    """Return a text or documents: part 0 is for calibration, and part 1 for evaluation."""
    try:
        return _content(source, part, cache_dir)
    except OSError as error:
        if source not in ("c4", "wikitext2"):
            raise
        option = ("calibration", "evaluation")[part]
        without = f"Without a network, use --{option} python-docs (in Python, {option}='python-docs') or a file."
        raise OSError(f"{str(error).rstrip('.')}. {without}") from error.__cause__


def _content(source: Any, part: int, cache_dir: str | None) -> str | Sequence[str]:
    if not isinstance(source, str):
        return documents_in(source, _IN_MEMORY)
    if source == "python-docs":
        return "\n\n".join(python_docs()[part].values())
    if source == "sklearn-docs":
        return sklearn_docs()
    if source == "c4":
        split, file = _C4[part]
        # no_checks: else datasets raises ExpectedMoreSplits, since one file is not all of C4.
        options = {"data_files": {split: file}, "verification_mode": "no_checks"}
        return load("allenai/c4", split=split, cache_dir=cache_dir, **options)["text"]
    if source == "wikitext2":
        split = ("train", "test")[part]
        return load("Salesforce/wikitext", "wikitext-2-raw-v1", split=split, cache_dir=cache_dir)[
            "text"
        ]
    loaded = load(source, cache_dir=cache_dir)
    if Path(source).suffix in EXTENSIONS:
        documents = documents_in(loaded, source)
        return documents[0] if source.endswith(".txt") else documents
    split = next((split for split in _HUB_SPLITS[part] if split in loaded), next(iter(loaded)))
    return documents_in(loaded[split], f"The data set {source}")


def python_docs() -> tuple[dict[str, str], dict[str, str]]:
    """Return the topics of Python's language reference (`help("topics")`) for calibration, and those for evaluation.

    The reference has about 465 kB in 79 topics. Calibration gets 70 % of the characters, and one version of Python
    always gives the same split. Many topics quote others ("specialnames" contains "customization"), so topics that
    share a paragraph of 80 characters or more are in the same part.
    """
    from pydoc_data.topics import topics

    def size(names: Sequence[str]) -> int:
        return sum(len(topics[name]) for name in names)

    parts: tuple[list[str], list[str]] = [], []
    for group in sorted(_quoting_groups(topics), key=lambda names: (-size(names), names)):
        # Add to the part that is further behind its fraction.
        evaluation_next = (
            size(parts[1]) * (1 - _EVALUATION_FRACTION) < size(parts[0]) * _EVALUATION_FRACTION
        )
        parts[evaluation_next].extend(group)
    calibration, evaluation = ({name: topics[name] for name in sorted(part)} for part in parts)
    return calibration, evaluation


def sklearn_docs() -> str:
    """Return the descriptions of scikit-learn's data sets: 14 texts with 43 kB, unrelated to Python's reference."""
    found = [
        file for file in files("sklearn.datasets.descr").iterdir() if file.name.endswith(".rst")
    ]
    return "\n\n".join(
        file.read_text(encoding="utf-8") for file in sorted(found, key=lambda file: file.name)
    )


def _quoting_groups(topics: Mapping[str, str]) -> list[list[str]]:
    """Group the topics that share a paragraph, directly or through others."""
    groups: list[tuple[list[str], set[str]]] = []
    for name in sorted(topics):
        names = [name]
        paragraphs = {p.strip() for p in topics[name].split("\n\n") if len(p.strip()) >= _QUOTATION}
        disjoint = []
        for group in groups:
            if paragraphs.isdisjoint(group[1]):
                disjoint.append(group)
            else:
                names = group[0] + names
                paragraphs = group[1] | paragraphs
        groups = [*disjoint, (names, paragraphs)]
    return [sorted(names) for names, _ in groups]
