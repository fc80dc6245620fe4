"""The texts: their names, where they come from, and which part is for what."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from wanda_lightning.core.name_patterns import did_you_mean
from wanda_lightning.data.hub import load_from_hub

_NAMES = ("c4", "wikitext2", "python-docs")
_EXTENSIONS = (".txt", ".jsonl", ".parquet")
_INSTEAD = "python-docs, which needs no network, or a FILE (.txt, .jsonl, .parquet)"
_C4_FILES = {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"}
_C4_EVALUATION_DOCUMENTS = 1100
_EVALUATION_SHARE = 0.3  # of the characters of python-docs
_QUOTE = 80  # characters from which a common paragraph is a quotation and no accident


def check_source(source: str) -> None:
    """Refuse what is neither a known name nor a file of a known kind.

    Raises:
        ValueError: For an unknown name or extension.
        FileNotFoundError: If the file does not exist.
    """
    path = Path(source).expanduser()
    if source in _NAMES or (path.suffix in _EXTENSIONS and path.is_file()):
        return
    if path.suffix in _EXTENSIONS:
        found = "is a folder: give the file" if path.exists() else "does not exist. Check the path"
        raise FileNotFoundError(f"The text file {source} {found}.")
    kinds = f"A text is one of {', '.join(_NAMES)}, or a file that ends in {', '.join(_EXTENSIONS)}"
    if path.exists():
        raise ValueError(f"{kinds}, but {source} ends in {path.suffix or 'nothing'}. Convert it or rename it.")
    raise ValueError(f"{kinds}, but {source!r} was asked for.{did_you_mean(source, _NAMES)}")


def calibration_source(source: str, cache_dir: str | None = None) -> str | Sequence[str]:
    """One text (`str`), or documents, as the calibration protocol of the source has it."""
    if source == "c4":
        return _c4("train", cache_dir)
    if source == "wikitext2":
        return " ".join(_wikitext2("train", cache_dir))
    if source == "python-docs":
        return "\n\n".join(python_docs()[0].values())
    return _read_file(Path(source).expanduser())


def evaluation_text(source: str, cache_dir: str | None = None) -> str:
    """The one text on which perplexity is measured."""
    if source == "c4":
        return " ".join(_c4("validation", cache_dir)[:_C4_EVALUATION_DOCUMENTS])
    if source == "wikitext2":
        return "\n\n".join(_wikitext2("test", cache_dir))
    if source == "python-docs":
        return "\n\n".join(python_docs()[1].values())
    content = _read_file(Path(source).expanduser())
    return content if isinstance(content, str) else "\n\n".join(content)


def _c4(split: str, cache_dir: str | None) -> Sequence[str]:
    table = load_from_hub(
        "allenai/c4",
        instead=_INSTEAD,
        data_files={split: _C4_FILES[split]},
        split=split,
        cache_dir=cache_dir,
        verification_mode="no_checks",  # else ExpectedMoreSplits: one file is not the whole of C4
    )
    return table["text"]


def _wikitext2(split: str, cache_dir: str | None) -> Sequence[str]:
    config = "wikitext-2-raw-v1"
    return load_from_hub("Salesforce/wikitext", config, instead=_INSTEAD, split=split, cache_dir=cache_dir)["text"]


def python_docs() -> tuple[dict[str, str], dict[str, str]]:
    """The language reference that every Python brings along (`help("topics")`), for calibration and evaluation.

    About 465 kB in 79 topics; 70 % of the characters for calibration, 30 % for evaluation, the same at every call in
    one version of Python. Many topics quote others ("specialnames" contains "customization"), so topics that share a
    paragraph stay together, and no paragraph of 80 characters or more is in both parts.
    """
    from pydoc_data.topics import topics

    def size(names: Sequence[str]) -> int:
        return sum(len(topics[name]) for name in names)

    parts: tuple[list[str], list[str]] = [], []
    for group in sorted(_quoting_groups(topics), key=lambda names: (-size(names), names)):
        behind = size(parts[1]) * (1 - _EVALUATION_SHARE) < size(parts[0]) * _EVALUATION_SHARE
        parts[behind].extend(group)
    calibration, evaluation = ({name: topics[name] for name in sorted(part)} for part in parts)
    return calibration, evaluation


def _quoting_groups(topics: Mapping[str, str]) -> list[list[str]]:
    r"""Topics by the paragraphs that they share, directly or through others.

    >>> _quoting_groups({"a": "x" * 80, "b": "y" * 80, "c": "z" * 80 + "\n\n" + "x" * 80})
    [['b'], ['a', 'c']]
    """
    groups: list[tuple[list[str], set[str]]] = []
    for name in sorted(topics):
        names, paragraphs = [name], {p.strip() for p in topics[name].split("\n\n") if len(p.strip()) >= _QUOTE}
        apart = []
        for group in groups:
            if paragraphs.isdisjoint(group[1]):
                apart.append(group)
            else:
                names, paragraphs = group[0] + names, group[1] | paragraphs
        groups = [*apart, (names, paragraphs)]
    return [sorted(names) for names, _ in groups]


def _read_file(path: Path) -> str | Sequence[str]:
    read = {".txt": _decode, ".jsonl": _read_jsonl, ".parquet": _read_parquet}[path.suffix]
    content: str | Sequence[str] = read(path)
    if not any(text.strip() for text in ([content] if isinstance(content, str) else content)):
        raise ValueError(f"The text file {path} was to be read, but there is no text in it. Give another file.")
    return content


def _decode(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"A text file should be in UTF-8, but {path} is not: byte {error.start} ({error.object[error.start]:#04x}) "
            "does not fit. Convert it: iconv -f LATIN1 -t UTF-8."
        ) from error


def json_rows(path: Path, fields: Sequence[str], expected: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of a .jsonl file that are not blank, each with the beginning of a message about it.

    Args:
        path: The file, in UTF-8.
        fields: What each line must have.
        expected: What they are called in a message; by default the fields.

    Raises:
        ValueError: If the file is not in UTF-8, or a line is no JSON object or lacks a field.
    """
    for number, line in enumerate(_decode(path).split("\n"), start=1):  # str.splitlines splits inside JSON, at U+2028
        if not line.strip():
            continue
        where = f"Each line of {path} should be a JSON object with {expected or _listed(fields)}, but line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON ({error}). Correct the line.") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where} is a {type(row).__name__}. Correct the line.")
        if missing := [name for name in fields if name not in row]:
            raise ValueError(f"{where} has {_listed(row)}. Rename the field that holds the {missing[0]}.")
        yield where, row


def _read_jsonl(path: Path) -> list[str]:
    documents = []
    for where, row in json_rows(path, ["text"], "a string 'text'"):
        if not isinstance(row["text"], str):
            raise ValueError(f"{where} has a 'text' of type {type(row['text']).__name__}. Correct the line.")
        documents.append(row["text"])
    return documents


def _read_parquet(path: Path) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        columns = pq.read_schema(path).names
        documents = pq.read_table(path, columns=["text"])["text"].to_pylist() if "text" in columns else []
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} was to be read as Parquet, but it is not ({error}). Give another file.") from error
    if "text" not in columns:
        raise ValueError(
            f"{path} should have a column 'text', but it has {_listed(columns)}. Rename the column that holds the text."
        )
    for number, document in enumerate(documents):
        if not isinstance(document, str):
            raise ValueError(
                f"The column 'text' of {path} should hold strings, but row {number} has a {type(document).__name__}. "
                "Drop the row or convert the column."
            )
    return documents


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "nothing"
