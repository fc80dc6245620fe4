"""The layout of a packed matrix and of a packed folder.

A matrix NAME becomes `NAME.compressed` (the kept values, row by row), `NAME.shape` (int64), and either `NAME.bitmask`
or, for 2:4, `NAME.pairs` (see `codec`). This is the layout of "sparse-bitmask" in compressed-tensors up to 0.14, but
without its row offsets: they can be counted from the bitmask, and take 8 bytes per row.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from wanda_lightning.packing import codec
from wanda_lightning.packing.tensor_file import Entry, TensorFile

METHOD = "wanda_lightning"
"""The `quant_method` in `config.json`; transformers prints it if this package was not imported."""
VERSION = 1
PREFIX = "packed-"  # of file names: a loader that does not know the format finds no weights

_GUARD = "the weights are packed; import wanda_lightning before they are loaded"
_BY, _VERSION, _PATTERNS = "packed_by", "packed_version", "packed_patterns"
_PATTERN_OF_CODE = {codec.PAIRS: "2:4", codec.BITMASK: "unstructured"}
VALUES = ".compressed"
"""The end of the name of the kept values of a matrix."""
_SHAPE, _OFFSETS = ".shape", ".row_offsets"
_OLD_FORMATS = ("sparse-bitmask", "sparse-24-bitmask")
COMPANIONS = (f".{codec.BITMASK}", f".{codec.PAIRS}", _SHAPE, _OFFSETS)
"""The ends of the names of the other tensors of a packed matrix."""
ENDS = (VALUES, *COMPANIONS)


@dataclass(frozen=True)
class PackedMatrix:
    """The place of a packed matrix in a file: the names of its values and positions, their code, and its shape."""

    values: str
    positions: str
    code: str
    shape: tuple[int, ...]

    def words(self, file: TensorFile) -> codec.Words:
        """Read and unpack the matrix as flat unsigned integers."""
        values, positions = file.words(self.values), positions_of(file, self)
        with explained(file.path, self.values.removesuffix(VALUES)):
            return codec.unpack(values, positions, self.shape, self.code)


def packed_entries(name: str, dense: Entry, code: str, kept: int) -> dict[str, Entry]:
    """Return what is stored for a matrix, in order: values, positions and shape.

    Args:
        name: The name of the matrix.
        dense: Its entry in the dense file.
        code: The code of the positions.
        kept: Number of values.
    """
    places = codec.positions_shape(dense.shape, code)
    return {
        name + VALUES: Entry(dense.dtype, (kept,), kept * dense.word_size),
        f"{name}.{code}": Entry("U8", places, prod(places)),
        name + _SHAPE: Entry("I64", (len(dense.shape),), 8 * len(dense.shape)),
    }


def refuse_reserved_names(names: Iterable[str], owner: object) -> None:
    """Raise a ValueError for a dense model with a tensor that has the name of a part of a packed matrix."""
    found = set(names)
    for name in sorted(found):
        matrix, _, end = name.rpartition(".")
        if f".{end}" == VALUES or (f".{end}" in COMPANIONS and matrix in found):
            raise ValueError(
                f"{owner} must have no tensor {name} to be packed, because a packed file stores a part of the matrix "
                f"{matrix} under this name. Rename the tensor, or leave the model dense."
            )


def matrices(file: TensorFile) -> dict[str, PackedMatrix]:
    """Return all packed matrices of a file.

    Raises:
        ValueError: If a part of one is missing.
    """
    found = {}
    for values in file.entries:
        if not values.endswith(VALUES):
            continue
        name = values.removesuffix(VALUES)
        codes = [code for code in (codec.BITMASK, codec.PAIRS) if f"{name}.{code}" in file.entries]
        if len(codes) != 1 or name + _SHAPE not in file.entries or name in file.entries:
            raise ValueError(
                f"{file.path} must store {name} as {values}, its shape, and one of .bitmask and .pairs, but it has "
                f"{', '.join(each for each in file.entries if each.startswith(name))}. Pack the model again."
            )
        found[name] = PackedMatrix(values, f"{name}.{codes[0]}", codes[0], file.integers(name + _SHAPE))
    return found


def positions_of(file: TensorFile, matrix: PackedMatrix) -> codec.Bytes:
    """Read the positions of a matrix in their shape."""
    return file.words(matrix.positions).reshape(file.entries[matrix.positions].shape)


def check_file(file: TensorFile) -> dict[str, PackedMatrix]:
    """Return all packed matrices of a file whose values and positions agree.

    Raises:
        ValueError: If they do not agree, or a part is missing.
    """
    found = matrices(file)
    for name, matrix in found.items():
        entry = file.entries[matrix.values]
        with explained(file.path, name):
            codec.check(entry.size // entry.word_size, positions_of(file, matrix), matrix.shape, matrix.code)
    return found


@contextmanager
def explained(path: Path, name: str) -> Iterator[None]:
    """Add the file, the name and advice to a `ValueError` of the codec."""
    try:
        yield
    except ValueError as error:
        raise ValueError(
            f"{path} cannot be unpacked, because the parts of {name} disagree: {error}. Copy, download or pack the "
            "model again."
        ) from error


# --------------------------------------------------------------------------------------------- headers and config.json


def patterns(codes: Iterable[str]) -> dict[str, int]:
    """Return how many matrices have each pattern, from their codes."""
    return dict(Counter(_PATTERN_OF_CODE[code] for code in codes))


def header(metadata: Mapping[str, str], codes: Iterable[str]) -> dict[str, str]:
    """Return the metadata of a packed file: the dense file's, the version, and the number of matrices per pattern.

    Args:
        metadata: The metadata of the dense file.
        codes: The code of each packed matrix.
    """
    return {**metadata, _BY: METHOD, _VERSION: str(VERSION), _PATTERNS: json.dumps(patterns(codes))}


def dense_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata of a packed file without what `header` added."""
    return {key: text for key, text in metadata.items() if key not in (_BY, _VERSION, _PATTERNS)}


def refuse_foreign(file: TensorFile) -> None:
    """Raise a ValueError for a file that this version of the package has not packed."""
    if file.metadata.get(_BY) != METHOD:
        raise ValueError(
            f"{file.path} must be packed, as config.json says, but it is an ordinary file. Restore the packed file, or "
            "remove quantization_config and transformers_weights from config.json."
        )
    refuse_version(file.metadata.get(_VERSION), file.path)


def refuse_version(version: object, where: object) -> None:
    """Raise a ValueError for another version of the format."""
    if str(version) != str(VERSION):
        raise ValueError(
            f"{where} must have version {VERSION} of the packed format, but it has {version}. Upgrade wanda_lightning, "
            "or pack the model again."
        )


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of `config.json`, or an empty dictionary if there is none.

    Raises:
        ValueError: If it is not a JSON object.
    """
    path = folder / "config.json"
    try:
        content = json.loads(path.read_bytes()) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}). Download or save the file again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, but it holds a {type(content).__name__}. Save it again.")
    return content


def packed_config(config: Mapping[str, Any], weights: str, codes: Iterable[str]) -> dict[str, Any]:
    """Return the configuration of a packed model. Without this package, transformers raises an error that shows _GUARD.

    Args:
        config: The configuration of the dense model.
        weights: Its only file of weights, or their index.
        codes: The code of each packed matrix.
    """
    described = {"quant_method": METHOD, "version": VERSION, "weights": PREFIX + weights, "patterns": patterns(codes)}
    return {**config, "quantization_config": described, "transformers_weights": _GUARD}


def dense_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of a packed model without what `packed_config` added."""
    return {key: value for key, value in config.items() if key not in ("quantization_config", "transformers_weights")}


def is_packed(config: Mapping[str, Any]) -> bool:
    """Whether this package packed the model that has this configuration."""
    found = config.get("quantization_config")
    return isinstance(found, Mapping) and found.get("quant_method") == METHOD


def is_old_bitmask(config: Mapping[str, Any]) -> bool:
    """Whether compressed-tensors packed the model, and did not also quantize it."""
    found = config.get("quantization_config")
    if not isinstance(found, Mapping) or found.get("config_groups"):
        return False
    sparse = found.get("sparsity_config")
    return isinstance(sparse, Mapping) and sparse.get("format") in _OLD_FORMATS


def lacks_weight(files: Iterable[TensorFile]) -> bool:
    """Whether compressed-tensors left `.weight` out of the names of packed matrices, as its newer versions do."""
    names = [name for file in files for name in file.entries if name.endswith(VALUES)]
    return not any(name.endswith(f".weight{VALUES}") for name in names)
