"""Read and write safetensors files one tensor at a time, as bytes.

The safetensors library writes a file only from tensors that are all in memory. A file is the length of its header, the
header in JSON, and the tensors without gaps (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

WORD_SIZES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
"""The dtypes whose entries have whole bytes, with their number."""

_METADATA = "__metadata__"
_LENGTH_BYTES = 8


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: its dtype as in the header, its shape, and its number of bytes."""

    dtype: str
    shape: tuple[int, ...]
    size: int

    @property
    def word_size(self) -> int:
        """Number of bytes of an entry; 1 if entries do not have whole bytes."""
        return WORD_SIZES.get(self.dtype, 1)


class TensorFile:
    """The header of a safetensors file.

    Attributes:
        path: The file.
        entries: Its tensors by name, in the order in which they are stored.
        metadata: The texts in the header.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is truncated or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._read()
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{path} is not a complete safetensors file ({error or type(error).__name__}). Copy, download or save "
                "it again."
            ) from error

    def _read(self) -> None:
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if size < _LENGTH_BYTES + length:
                raise ValueError(f"it has {size} bytes, but its header needs {_LENGTH_BYTES + length}")
            header = json.loads(file.read(length))
        self.metadata: dict[str, str] = header.pop(_METADATA, None) or {}
        self._data = at = _LENGTH_BYTES + length
        self.entries: dict[str, Entry] = {}
        self._starts: dict[str, int] = {}
        for name, found in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, stop = found["data_offsets"]
            entry = Entry(str(found["dtype"]), tuple(map(int, found["shape"])), stop - start)
            whole = entry.dtype not in WORD_SIZES or entry.size == prod(entry.shape) * entry.word_size
            if self._data + start != at or stop < start or not whole:
                raise ValueError(f"the place of {name} does not fit its shape or the tensor before it")
            self.entries[name], self._starts[name] = entry, at
            at += entry.size
        if size != at:
            raise ValueError(f"it has {size} bytes instead of {at}")

    def words(self, name: str) -> NDArray[Any]:
        """Return a tensor as flat unsigned integers of the size of its entries, which are read when they are used."""
        entry = self.entries[name]
        dtype, count = f"<u{entry.word_size}", entry.size // entry.word_size
        if count == 0:
            return np.empty(0, dtype)
        try:
            return np.memmap(self.path, dtype, "r", self._starts[name], count).view(np.ndarray)
        except ValueError as error:
            raise OSError(f"{self.path} must not change while it is read, but it has. Start again.") from error

    def integers(self, name: str) -> tuple[int, ...]:
        """Read a short tensor of int64."""
        return tuple(self.words(name).view("<i8").tolist())


@contextmanager
def writing(path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> Iterator[BinaryIO]:
    """Write the header of a file, and yield the file, to which arrays are written in the order of `entries`."""
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    at = 0
    for name, entry in entries.items():
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [at, at + entry.size]}
        at += entry.size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
        yield file
        assert file.tell() == _LENGTH_BYTES + len(text) + at
