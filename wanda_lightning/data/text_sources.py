"""Texts by name or file, split for calibration and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from wanda_lightning.core.name_patterns import did_you_mean
from wanda_lightning.data.demo import python_docs
from wanda_lightning.data.hub import load_from_hub
from wanda_lightning.data.text_files import EXTENSIONS, read_file

_ALTERNATIVE = "python-docs, which needs no network, or a FILE (.txt, .jsonl, .parquet)"
_C4_FILES = {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"}
_C4_EVALUATION_DOCUMENTS = 1100


def _c4(split: str, cache_dir: str | None) -> Sequence[str]:
    table = load_from_hub(
        "allenai/c4",
        instead=_ALTERNATIVE,
        data_files={split: _C4_FILES[split]},
        split=split,
        cache_dir=cache_dir,
        verification_mode="no_checks",  # else datasets raises ExpectedMoreSplits, since one file is not all of C4
    )
    return table["text"]


def _wikitext2(split: str, cache_dir: str | None) -> Sequence[str]:
    config = "wikitext-2-raw-v1"
    return load_from_hub("Salesforce/wikitext", config, instead=_ALTERNATIVE, split=split, cache_dir=cache_dir)["text"]


@dataclass(frozen=True)
class _Corpus:
    """A named text: functions of the cache folder that return the text or documents of each part."""

    calibration: Callable[[str | None], str | Sequence[str]]
    evaluation: Callable[[str | None], str]


_CORPORA = {
    "c4": _Corpus(
        lambda cache_dir: _c4("train", cache_dir),
        lambda cache_dir: " ".join(_c4("validation", cache_dir)[:_C4_EVALUATION_DOCUMENTS]),
    ),
    "wikitext2": _Corpus(
        lambda cache_dir: " ".join(_wikitext2("train", cache_dir)),
        lambda cache_dir: "\n\n".join(_wikitext2("test", cache_dir)),
    ),
    "python-docs": _Corpus(
        lambda _: "\n\n".join(python_docs()[0].values()),
        lambda _: "\n\n".join(python_docs()[1].values()),
    ),
}


def check_source(source: str, option: str = "text") -> None:
    """Check that a source is a known name or a file of a known format.

    Args:
        source: A name or a file.
        option: Name of the option, for the error message.

    Raises:
        ValueError: For an unknown name or extension.
        FileNotFoundError: If the file does not exist.
    """
    path = Path(source).expanduser()
    if source in _CORPORA or (path.suffix in EXTENSIONS and path.is_file()):
        return
    if path.suffix in EXTENSIONS:
        found = "is a folder. Give the file" if path.exists() else "does not exist. Check the path"
        raise FileNotFoundError(f"{option} {source} {found}.")
    kinds = f"{option} must be one of {', '.join(_CORPORA)}, or a file that ends in {', '.join(EXTENSIONS)}"
    if path.exists():
        raise ValueError(f"{kinds}, but {source} ends in {path.suffix or 'nothing'}. Convert it or rename it.")
    raise ValueError(f"{kinds}, but it is {source!r}.{did_you_mean(source, _CORPORA)}")


def calibration_source(source: str, cache_dir: str | None = None) -> str | Sequence[str]:
    """Return one text, or a sequence of documents, from which calibration windows are drawn."""
    if source in _CORPORA:
        return _CORPORA[source].calibration(cache_dir)
    return read_file(Path(source).expanduser())


def evaluation_text(source: str, cache_dir: str | None = None) -> str:
    """Return the text on which perplexity is measured."""
    if source in _CORPORA:
        return _CORPORA[source].evaluation(cache_dir)
    content = read_file(Path(source).expanduser())
    return content if isinstance(content, str) else "\n\n".join(content)
