"""Pack a model folder and unpack it again, one tensor at a time."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wanda_lightning.files import refuse_full, refuse_replacement, whole_folder
from wanda_lightning.hub.card import update_card
from wanda_lightning.packing import codec, layout
from wanda_lightning.packing.tensor_file import WORD_SIZES, Entry, TensorFile, writing
from wanda_lightning.progress import ProgressBar

_CONFIG = "config.json"
_WEIGHTS, _INDICES = "*.safetensors", "*.safetensors.index.json"
_OTHER_WEIGHTS = ("pytorch_model*", "tf_model*", "flax_model*")  # the dense weights in formats before safetensors
_SHARD = re.compile(r"-\d{5}-of-\d{5}(?=\.safetensors$)")


@dataclass(frozen=True)
class PackedSize:
    """Sizes before and after packing.

    Attributes:
        dense: Number of bytes of all tensors before.
        packed: Number of bytes after.
        dense_matrices: Number of bytes of the matrices that were packed, before.
        packed_matrices: Number of bytes of the same matrices after.
        codes: The code of each of them, by name.
    """

    dense: int
    packed: int
    dense_matrices: int
    packed_matrices: int
    codes: Mapping[str, str]


def pack(
    source: str | os.PathLike[str], target: str | os.PathLike[str], overwrite: bool = False, show_progress: bool = False
) -> PackedSize:
    """Pack the model in a folder: a matrix with enough zeros is stored as its kept values and their positions.

    Only one tensor is in memory at a time. Other files are copied, but not the same weights in the formats of
    earlier versions of transformers, such as pytorch_model.bin. A model card that this package wrote is updated.

    Args:
        source: Folder of a Hugging Face or timm model with weights in safetensors.
        target: Folder to write. It appears complete or not at all.
        overwrite: Replace a model that is already in the target.
        show_progress: Show a progress bar.

    Returns:
        The sizes before and after.

    Raises:
        OSError: If a path cannot be read or written, or the disk is too small.
        ValueError: If the source is damaged, quantized or already packed.
    """
    place = _folder(source, target)
    _refuse_to_pack(place)
    refuse_replacement(target, overwrite)
    parts, codes = _parts_to_pack(place, show_progress)
    refuse_full(target, sum(part.size for part in parts))
    with whole_folder(target, overwrite) as new:
        _copy_other_files(place, new, _OTHER_WEIGHTS)
        _write_packed(parts, codes, place, new, show_progress)
        update_card(new, target, packed=True)
    return _size(parts, codes)


def pack_in_place(folder: Path) -> PackedSize:
    """Pack the dense model in a folder that nothing else uses yet."""
    _refuse_to_pack(folder)
    parts, codes = _parts_to_pack(folder)
    refuse_full(folder, sum(part.size for part in parts))
    dense = [*folder.glob(_WEIGHTS), *folder.glob(_INDICES)]
    _write_packed(parts, codes, folder, folder)
    for path in dense:
        path.unlink()
    return _size(parts, codes)


def unpack(
    source: str | os.PathLike[str], target: str | os.PathLike[str], overwrite: bool = False, show_progress: bool = False
) -> None:
    """Restore the dense model from a folder that `pack` has written, bit for bit.

    Folders in the formats "sparse-bitmask" and "sparse-24-bitmask" of compressed-tensors are read, too. Only one tensor
    is in memory at a time. Other files are copied.

    Args:
        source: The packed folder.
        target: Folder to write. It appears complete or not at all.
        overwrite: Replace a model that is already in the target.
        show_progress: Show a progress bar.

    Raises:
        OSError: If a path cannot be read or written, or the disk is too small.
        ValueError: If the source is not packed, has another version of the format, or is damaged.
    """
    place = _folder(source, target)
    config = layout.read_config(place)
    if not layout.is_packed(config) and not layout.is_old_bitmask(config):
        raise ValueError(
            f"{source} must be packed to be unpacked, but its config.json does not say so. Load it as it is, or give "
            "the folder that wanda-lightning pack has written."
        )
    refuse_replacement(target, overwrite)
    files = packed_files(place)
    adds_weight = layout.is_old_bitmask(config) and layout.lacks_weight(files)
    parts = [_part_to_unpack(file, adds_weight) for file in files]
    refuse_full(target, sum(part.size for part in parts))
    with whole_folder(target, overwrite) as new:
        _copy_other_files(place, new)
        _write_parts(parts, new, "Unpacking", show_progress)
        _write_indices(parts, place, new, _dense_name)
        if dense := layout.dense_config(config):
            _write_json(new / _CONFIG, dense)
        update_card(new, target, packed=False)


def packed_files(folder: Path) -> list[TensorFile]:
    """Return the files of weights of a packed folder.

    Raises:
        ValueError: If the version of the format is not supported, or config.json and the files disagree.
    """
    config, files = layout.read_config(folder), _tensor_files(folder)
    if layout.is_packed(config):
        layout.refuse_version(config["quantization_config"].get("version"), folder / _CONFIG)
        for file in files:
            layout.refuse_foreign(file)
    return files


# ------------------------------------------------------------------------------------------------------------ parts


@dataclass(frozen=True)
class _Part:
    """A file of weights that will be written.

    Attributes:
        file: The file that it is made from.
        name: The name of the new file.
        metadata: The metadata of the new file.
        entries: What will be in it, in order.
        pieces: Functions that read the tensors of the old file, in the same order, and return what will be written.
    """

    file: TensorFile
    name: str
    metadata: Mapping[str, str]
    entries: Mapping[str, Entry]
    pieces: Mapping[str, Callable[[], Sequence[NDArray[Any]]]]

    @property
    def size(self) -> int:
        return sum(entry.size for entry in self.entries.values())


def _part_to_pack(file: TensorFile, bar: ProgressBar) -> tuple[_Part, dict[str, str]]:
    """Read a dense file, and choose a code for each matrix that will be packed."""
    codes: dict[str, str] = {}
    entries: dict[str, Entry] = {}
    for name, dense in file.entries.items():
        bar.show(name)
        code, kept = codec.DENSE, 0
        if dense.dtype in WORD_SIZES:
            code, kept = codec.cheapest(file.words(name), dense.shape)
        if code == codec.DENSE:
            entries[name] = dense
        else:
            codes[name] = code
            entries |= layout.packed_entries(name, dense, code, kept)
        bar.advance()
    pieces = {name: partial(_packed, file, name, codes.get(name)) for name in file.entries}
    metadata = layout.header(file.metadata, codes.values())
    return _Part(file, _packed_name(file.path.name), metadata, entries, pieces), codes


def _packed(file: TensorFile, name: str, code: str | None) -> Sequence[NDArray[Any]]:
    words, shape = file.words(name), file.entries[name].shape
    return [words] if code is None else [*codec.pack(words, shape, code), np.array(shape, "<i8")]


def _part_to_unpack(file: TensorFile, adds_weight: bool) -> _Part:
    """Check a packed file.

    Raises:
        ValueError: If its tensors disagree.
    """
    found = layout.check_file(file)
    companions = {f"{name}{end}" for name in found for end in layout.COMPANIONS}
    entries: dict[str, Entry] = {}
    pieces: dict[str, Callable[[], Sequence[NDArray[Any]]]] = {}
    for stored, entry in file.entries.items():
        name = stored.removesuffix(layout.VALUES)
        if stored.endswith(layout.VALUES) and name in found:
            matrix = found[name]
            name += ".weight" if adds_weight else ""
            entries[name] = Entry(entry.dtype, matrix.shape, prod(matrix.shape) * entry.word_size)
            pieces[name] = partial(_unpacked, file, matrix)
        elif stored not in companions:
            entries[stored] = entry
            pieces[stored] = partial(_packed, file, stored, None)
    return _Part(file, _dense_name(file.path.name), layout.dense_metadata(file.metadata), entries, pieces)


def _unpacked(file: TensorFile, matrix: layout.PackedMatrix) -> Sequence[NDArray[Any]]:
    return [matrix.words(file)]


def _packed_name(name: str) -> str:
    return layout.PREFIX + name


def _dense_name(name: str) -> str:
    return name.removeprefix(layout.PREFIX)


# ---------------------------------------------------------------------------------------------------------- folders


def _folder(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> Path:
    """Return the source, which must be a folder and apart from the target."""
    place, other = (Path(path).expanduser().resolve() for path in (source, target))
    if not place.is_dir():
        raise FileNotFoundError(f"{source} must be the folder of a model, but it is not a folder. Check the path.")
    if place == other or place.is_relative_to(other) or other.is_relative_to(place):
        raise FileExistsError(f"{target} must lie outside of {source}, which is read. Choose another folder.")
    return place


def _refuse_to_pack(folder: Path) -> None:
    """Raise a ValueError for a model that is packed or quantized, or whose file or tensors have other names."""
    config = layout.read_config(folder)
    if config.get("quantization_config"):
        found = "packed already" if layout.is_packed(config) or layout.is_old_bitmask(config) else "quantized"
        raise ValueError(f"{folder} must be a dense model to be packed, but it is {found}. Give the dense model.")
    if "transformers_weights" in config:
        raise ValueError(
            f"{folder} must have its weights in model.safetensors, but config.json names "
            f"{config['transformers_weights']}. Rename the file, and remove transformers_weights from config.json."
        )
    layout.refuse_reserved_names((name for file in _tensor_files(folder) for name in file.entries), folder)


def used_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the files of weights and the indices of a folder, without those that no loader uses.

    transformers and timm look for NAME.safetensors first, and ignore an index of this name and its shards.
    """
    paths, indices = sorted(folder.glob(_WEIGHTS)), sorted(folder.glob(_INDICES))
    names = {path.name for path in paths}
    ignored = {path.name for path in paths if _SHARD.search(path.name) and _SHARD.sub("", path.name) in names}
    used = []
    for index in indices:
        if (single := index.name.removesuffix(".index.json")) not in names:
            used.append(index)
            continue
        with suppress(ValueError):
            ignored |= set(_weight_map(index).values()) - {single}
    return [path for path in paths if path.name not in ignored], used


def _tensor_files(folder: Path) -> list[TensorFile]:
    """Return the safetensors files of a folder; all files that an index names must be there."""
    paths, indices = used_files(folder)
    if not paths:
        found = ", ".join(sorted(path.name for path in folder.iterdir())) or "no file"
        raise FileNotFoundError(
            f"{folder} must have weights in safetensors, but it has {found}. Save the model in this format."
        )
    for index in indices:
        missing = set(_weight_map(index).values()) - {path.name for path in paths}
        if missing:
            raise FileNotFoundError(f"{index} names {min(missing)}, which is missing. Copy or download it.")
    return [TensorFile(path) for path in paths]


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found = json.loads(index.read_bytes())["weight_map"]
        return {str(name): str(file) for name, file in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of weights ({error}). Download or save it again.") from error


def _main_weights(folder: Path) -> str:
    """Return the name of the file that transformers and timm load, or of its index."""
    paths, indices = used_files(folder)
    names = [path.name for path in (*indices, *paths)]
    standard = ("model.safetensors", "model.safetensors.index.json")
    return next((name for name in standard if name in names), names[0])


def _parts_to_pack(folder: Path, show_progress: bool = False) -> tuple[list[_Part], dict[str, str]]:
    """Return what packing the files of a folder would write, and the code of each matrix."""
    files = _tensor_files(folder)
    codes: dict[str, str] = {}
    parts = []
    with ProgressBar("Examining", sum(len(file.entries) for file in files), show_progress) as bar:
        for file in files:
            part, own = _part_to_pack(file, bar)
            parts.append(part)
            codes |= own
    return parts, codes


def _write_packed(
    parts: Sequence[_Part], codes: Mapping[str, str], source: Path, target: Path, show_progress: bool = False
) -> None:
    _write_parts(parts, target, "Packing", show_progress)
    _write_indices(parts, source, target, _packed_name)
    config = layout.packed_config(layout.read_config(source), _main_weights(source), codes.values())
    _write_json(target / _CONFIG, config)


def _write_parts(parts: Sequence[_Part], folder: Path, title: str, show_progress: bool) -> None:
    with ProgressBar(title, sum(len(part.pieces) for part in parts), show_progress) as bar:
        for part in parts:
            with writing(folder / part.name, part.entries, part.metadata) as out:
                for name, read in part.pieces.items():
                    bar.show(name)
                    for piece in read():
                        out.write(piece.data)  # tofile would not say that the disk is full
                    bar.advance()


def _write_indices(parts: Sequence[_Part], source: Path, target: Path, renamed: Callable[[str], str]) -> None:
    """Write each index of the source with the new names of tensors and files."""
    by_file = {part.file.path.name: part for part in parts}
    for path in used_files(source)[1]:
        own = [by_file[file] for file in dict.fromkeys(_weight_map(path).values())]
        weight_map = {name: part.name for part in own for name in part.entries}
        size = sum(part.size for part in own)
        _write_json(target / renamed(path.name), {"metadata": {"total_size": size}, "weight_map": weight_map})


def _copy_other_files(source: Path, target: Path, left_out: Sequence[str] = ()) -> None:
    ignored = shutil.ignore_patterns(_WEIGHTS, _INDICES, _CONFIG, *left_out, ".git")
    for path in source.iterdir():
        if path.name in ignored(str(source), [path.name]):
            continue
        if path.is_dir():
            shutil.copytree(path, target / path.name)
        else:
            shutil.copyfile(path, target / path.name)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _size(parts: Sequence[_Part], codes: Mapping[str, str]) -> PackedSize:
    """Return the sizes of tensors before and after."""
    dense = {name: entry for part in parts for name, entry in part.file.entries.items()}
    packed = {name: entry.size for part in parts for name, entry in part.entries.items()}
    return PackedSize(
        dense=sum(entry.size for entry in dense.values()),
        packed=sum(packed.values()),
        dense_matrices=sum(dense[name].size for name in codes),
        packed_matrices=sum(
            packed[f"{name}{end}"] for name in codes for end in layout.ENDS if f"{name}{end}" in packed
        ),
        codes=dict(codes),
    )
