"""Read texts and documents from .txt, .jsonl and .parquet files; every error names the file and the line or row."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from wanda_lightning.checks import one_line

EXTENSIONS = (".txt", ".jsonl", ".parquet")
_BYTE_ORDER_MARKS = {  # UTF-32 first: its little-endian mark starts with that of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def read_file(path: Path) -> str | Sequence[str]:
    """Return the text of a .txt file, or the documents of a .jsonl or .parquet file.

    Raises:
        ValueError: If the file is damaged, has another format than its extension, is not in UTF-8, or has no text.
    """
    read = {".txt": _decode, ".jsonl": _read_jsonl, ".parquet": _read_parquet}[path.suffix]
    content: str | Sequence[str] = read(path)
    if not any(text.strip() for text in ([content] if isinstance(content, str) else content)):
        raise ValueError(f"The text file {path} must have text, but it has none. Give another file.")
    return content


def _decode(path: Path) -> str:
    data = path.read_bytes()
    wide = next((name for mark, name in _BYTE_ORDER_MARKS.items() if data.startswith(mark)), None)
    if wide is None and (first := data.find(0)) >= 0:
        wide = "UTF-16LE" if first % 2 else "UTF-16BE"  # as ASCII characters are stored
    if wide is not None:
        raise ValueError(
            f"A text file must be in UTF-8, but {path} seems to be in {wide}: it has "
            f"{'its byte order mark' if data.startswith(tuple(_BYTE_ORDER_MARKS)) else f'a NUL at byte {first}'}. "
            f"Convert it: iconv -f {wide} -t UTF-8."
        )
    try:
        return data.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"A text file must be in UTF-8, but {path} is not: byte {error.start} ({data[error.start]:#04x}) is "
            "invalid. Convert it: iconv -f ENCODING -t UTF-8, where ENCODING is LATIN1 or what the command file finds."
        ) from error


def json_rows(path: Path, fields: Sequence[str], expected: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a .jsonl file, each after the start of an error message that names its line; skip blank lines.

    Args:
        path: The file, in UTF-8.
        fields: Fields that each line must have.
        expected: Description of the fields in an error message; by default their names.

    Raises:
        ValueError: If the file is not in UTF-8, or a line is not a JSON object, lacks a field or is not valid Unicode.
    """
    for number, line in enumerate(_decode(path).split("\n"), start=1):  # str.splitlines splits inside JSON, at U+2028
        if not line.strip():
            continue
        where = f"Each line of {path} must be a JSON object with {expected or _listed(fields)}, but line {number}"
        try:
            row = json.loads(line)
        except RecursionError as error:
            raise ValueError(f"{where} is nested too deep. Correct the line.") from error
        except ValueError as error:
            raise ValueError(f"{where} is not JSON ({error}). Correct the line.") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where} is a {type(row).__name__}. Correct the line.")
        if missing := [name for name in fields if name not in row]:
            raise ValueError(f"{where} has {_listed(row)}. Rename the field that holds the {missing[0]}.")
        if "\\ud" in line.lower() and re.search(r"[\ud800-\udfff]", json.dumps(row, ensure_ascii=False)):
            raise ValueError(f"{where} has half of a surrogate pair, which is not a character. Correct the line.")
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
        file = pq.ParquetFile(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"The text file {path} must be in the format Parquet, but it cannot be read as such ({one_line(error)}). "
            "Give another file."
        ) from error
    with file:
        columns = file.schema_arrow.names
        if "text" not in columns:
            raise ValueError(
                f"The text file {path} must have a column 'text', but it has {_listed(columns)}. Rename its column."
            )
        documents: list[str] = []
        for group in range(file.num_row_groups):
            first, count = len(documents), file.metadata.row_group(group).num_rows
            try:
                documents += file.read_row_group(group, columns=["text"])["text"].to_pylist()
            except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                raise ValueError(
                    f"The text file {path} cannot be read: rows {first} to {first + count - 1} are damaged "
                    f"({one_line(error)}). Download or save it again."
                ) from error
    for number, document in enumerate(documents):
        if not isinstance(document, str):
            raise ValueError(
                f"The column 'text' of {path} must hold strings, but row {number} has a {type(document).__name__}. "
                "Drop the row or convert the column."
            )
    return documents


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "nothing"
