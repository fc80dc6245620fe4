"""Read texts and documents from .txt, .jsonl and .parquet files; every error names the file and the line or row."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from wanda_lightning.common.errors import UserError
from wanda_lightning.common.words import one_line

EXTENSIONS = (".txt", ".jsonl", ".parquet")


def read_file(path: Path) -> str | Sequence[str]:
    """Return the text of a .txt file, or the documents of a .jsonl or .parquet file; refuse one that cannot be read."""
    read = {".txt": _decode, ".jsonl": _read_jsonl, ".parquet": _read_parquet}[path.suffix]
    content: str | Sequence[str] = read(path)
    if not any(text.strip() for text in ([content] if isinstance(content, str) else content)):
        raise UserError(f"The text file {path} must have text, but it has none. Give another file.")
    return content


def _decode(path: Path) -> str:
    data = path.read_bytes()
    encoding, why = json.detect_encoding(data).upper(), ""  # by a byte order mark or the first four bytes
    if encoding.startswith("UTF-8") and (nul := data.find(0)) >= 0:
        encoding = "UTF-16LE" if nul % 2 else "UTF-16BE"  # as ASCII characters are stored
        why = f", since byte {nul} is NUL"
    if not encoding.startswith("UTF-8"):
        encoding = encoding.replace("-LE", "LE").replace("-BE", "BE")  # as iconv names them
        raise UserError(
            f"A text file must be in UTF-8, but {path} seems to be in {encoding}{why}. "
            f"Convert it: iconv -f {encoding} -t UTF-8."
        )
    try:
        return data.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UserError(
            f"A text file must be in UTF-8, but {path} is not: byte {error.start} ({data[error.start]:#04x}) is "
            "invalid. Convert it: iconv -f ENCODING -t UTF-8, where ENCODING is LATIN1 or what the command file finds."
        ) from error


def json_rows(path: Path, fields: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a .jsonl file with these fields, each with the beginning of an error that names its line.

    Blank lines are skipped; a line that is not a JSON object, lacks a field or is not valid Unicode is refused.
    """
    for number, line in enumerate(_decode(path).split("\n"), start=1):  # str.splitlines splits inside JSON, at U+2028
        if not line.strip():
            continue
        where = f"Each line of {path} must be a JSON object with {_listed(fields)}, but line {number}"
        try:
            row = json.loads(line)
        except RecursionError as error:
            raise UserError(f"{where} is nested too deep. Correct the line.") from error
        except ValueError as error:
            raise UserError(f"{where} is not JSON ({error}). Correct the line.") from error
        if not isinstance(row, dict):
            raise UserError(f"{where} is a {type(row).__name__}. Correct the line.")
        if missing := [name for name in fields if name not in row]:
            raise UserError(f"{where} has {_listed(row)}. Rename the field that holds the {missing[0]}.")
        if "\\ud" in line.lower() and re.search(r"[\ud800-\udfff]", json.dumps(row, ensure_ascii=False)):
            raise UserError(f"{where} has half of a surrogate pair, which is not a character. Correct the line.")
        yield where, row


def _read_jsonl(path: Path) -> list[str]:
    documents = []
    for where, row in json_rows(path, ["text"]):
        if not isinstance(row["text"], str):
            raise UserError(f"{where} has a 'text' of type {type(row['text']).__name__}, not a string. Correct it.")
        documents.append(row["text"])
    return documents


def _read_parquet(path: Path) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            columns = file.schema_arrow.names
            batches = file.iter_batches(columns=["text"]) if "text" in columns else ()
            documents = [document for batch in batches for document in batch["text"].to_pylist()]
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"The text file {path} must be in the format Parquet, but it has another format or is damaged "
            f"({one_line(error)}). Download or save it again."
        ) from error
    if "text" not in columns:
        raise UserError(
            f"The text file {path} must have a column 'text', but it has {_listed(columns)}. Rename its column."
        )
    for number, document in enumerate(documents):
        if not isinstance(document, str):
            raise UserError(
                f"The column 'text' of {path} must hold strings, but row {number} has a {type(document).__name__}. "
                "Drop the row or convert the column."
            )
    return documents


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "nothing"
