"""A model folder that is written part by part, and resumed after a crash."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from wanda_lightning.common.errors import UserError
from wanda_lightning.common.killed_runs import flush_folder, is_locked, lock, unlock
from wanda_lightning.common.progress import ProgressBar
from wanda_lightning.common.refuse_path import (
    PROGRESS_NAME,
    ROW_WEIGHTS_NAME,
    refuse_full,
    refuse_unresumable,
    resolved,
)
from wanda_lightning.common.words import one_line
from wanda_lightning.common.write_whole import replace_file, whole_file
from wanda_lightning.models import SkippedMatrix
from wanda_lightning.parallel import SINGLE_PROCESS, Processes
from wanda_lightning.report import PrunedLayer
from wanda_lightning.report.records import as_json, from_parsed

_INDEX = "model.safetensors.index.json"
_VERSION = 1  # of the progress file


@dataclass(frozen=True)
class PartRecord:
    """The record of a part: its layers, and the file that holds it."""

    layers: list[PrunedLayer] = field(default_factory=list)
    skipped: list[SkippedMatrix] = field(default_factory=list)
    few_tokens: dict[str, int] = field(default_factory=dict)  # by expert's layer
    zero_units: dict[str, int] = field(default_factory=dict)  # hidden units that are zero, by the layer that reads them
    zeros: int = 0
    keys: list[str] = field(default_factory=list)  # names of the tensors in its file
    size: int = 0  # of the tensors, in bytes
    checksum: str = ""  # of its file; empty if it has no tensors and so no file


@dataclass
class Progress:
    """The content of the progress file."""

    version: int
    made_with: dict[str, Any]  # choices and data that determine the result
    sparsities: dict[str, float]  # of each layer, once it is known
    row_weights: str  # checksum of their file; empty if there is none
    written: dict[str, PartRecord]  # by part
    report: str  # of the finished pruning, as JSON


class OutputFolder:
    """The folder of a pruned model, with one safetensors file for each part.

    A part is written as a whole, and the files without which the folder is not a model come last. Only one run may
    write into the folder, and of its processes only the first one. The folder is empty, does not exist, or was left by
    an interrupted run with the same choices and data, `made_with`; any other folder is refused.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        made_with: Mapping[str, Any],
        parts: Sequence[str],
        size: int = 0,
        processes: Processes = SINGLE_PROCESS,
        show_progress: bool = False,
    ) -> None:
        self.path, self._parts = resolved(folder), list(parts)
        self.progress = Progress(_VERSION, json.loads(json.dumps(made_with, default=str)), {}, "", {}, "")
        self._processes, self._show_progress = processes, show_progress
        self._lock: int | None = None
        self.bytes_written = 0  # by this process
        self._is_begun = self._is_new = False  # whether this process has written a record, and made the folder
        with self._in_first() as is_first:
            if is_first:
                self._open(folder, size)
        self.progress = processes.broadcast(self.progress, 0)

    @contextmanager
    def _in_first(self) -> Iterator[bool]:
        """Yield True in the first process, which writes, and False in the others, which wait for it."""
        with self._processes.fail_together():
            yield self._processes.rank == 0

    def _open(self, folder: str | os.PathLike[str], size: int) -> None:
        refuse_unresumable(folder)
        self._is_new = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        flush_folder(self.path.parent)
        self._lock = lock(self.path)
        if self._lock is None and is_locked(self.path):
            raise FileExistsError(f"{folder} is being written by another run. Wait for it to end, or choose another.")
        try:
            if (self.path / PROGRESS_NAME).is_file():
                self._resume(folder, self._read_progress(folder))
            refuse_full(folder, size - sum(record.size for record in self.progress.written.values()))
            self._save_progress()
            self._is_begun = True
        except BaseException:
            self.close()
            raise

    def _read_progress(self, folder: object) -> Progress:
        file = self.path / PROGRESS_NAME
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if isinstance(content, Mapping) and content.get("version") != _VERSION:
                raise UserError(f"version must be {_VERSION}, but it is {content.get('version')!r}.")
            progress: Progress = from_parsed(Progress, content)
            return progress
        except ValueError as error:
            raise UserError(
                f"{file} is not the record of an interrupted run of this version: {one_line(error)} Delete {folder} to "
                "begin anew, or choose another folder."
            ) from error

    def _resume(self, folder: object, begun: Progress) -> None:
        """Continue an interrupted run with the same choices; parts whose files have changed since are written again."""
        own = self.progress
        differing = list(_differences(begun.made_with, own.made_with))
        unknown = [f"another part of the model, {part}" for part in begun.written if part not in self._parts]
        if begun.written and (reasons := differing + unknown):
            others = f" (and {len(reasons) - 1} more)" if reasons[1:] else ""
            raise UserError(
                f"{folder} was begun with {reasons[0]}{others}. Use the same choices, data and model to go on, or "
                "another folder."
            )
        with ProgressBar("Checking written parts", len(begun.written), self._show_progress) as bar:
            for part, record in begun.written.items():
                if not record.keys or self._is_whole(self._path(part), record.checksum):
                    own.written[part] = record
                bar.advance()
        has_weights = not begun.row_weights or self._is_whole(self.path / ROW_WEIGHTS_NAME, begun.row_weights)
        if has_weights and not differing:
            own.sparsities, own.row_weights = begun.sparsities, begun.row_weights
        own.report = begun.report if own.written.keys() >= set(self._parts) else ""

    def _is_whole(self, file: Path, checksum: str) -> bool:
        """Whether a file is unchanged since it was written; warn if not."""
        if file.is_file() and _checksum(file) == checksum:
            return True
        warnings.warn(f"{file} is {'damaged' if file.exists() else 'missing'}, so it is made again.", stacklevel=2)
        return False

    def _path(self, part: str) -> Path:
        number = self._parts.index(part) + 1
        return self.path / f"model-{number:05d}-of-{len(self._parts):05d}.safetensors"

    def save(self, part: str, tensors: Mapping[str, Tensor], record: PartRecord) -> None:
        """Write a part and its record in the first process; the others do not wait for it."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        is_first = self._processes.rank == 0
        checksum = ""
        if is_first and tensors:
            with whole_file(self._path(part)) as new:
                save_file(dict(tensors), new, metadata={"format": "pt"})
                checksum = _checksum(new)
        self.progress.written[part] = replace(record, keys=list(tensors), size=size, checksum=checksum)
        if is_first:
            self.bytes_written += size
            self._save_progress()

    def save_allocation(self, sparsities: Mapping[str, float], row_weights: Mapping[str, Tensor]) -> None:
        """Write the sparsity of each layer, and the row weights of those that have any."""
        self.progress.sparsities = dict(sparsities)
        with self._in_first() as is_first:
            if is_first and row_weights:
                with whole_file(self.path / ROW_WEIGHTS_NAME) as new:
                    save_file(dict(row_weights), new)
                    self.progress.row_weights = _checksum(new)
            if is_first:
                self._save_progress()

    def row_weights(self) -> dict[str, Tensor]:
        """Read the row weights; empty if no layer has any."""
        return load_file(self.path / ROW_WEIGHTS_NAME) if self.progress.row_weights else {}

    def _save_progress(self) -> None:
        with whole_file(self.path / PROGRESS_NAME) as new:
            new.write_text(as_json(asdict(self.progress)), encoding="utf-8")

    def stored(self, part: str) -> dict[Path, list[str]]:
        """Return the file and the names of the tensors of a written part."""
        return {self._path(part): self.progress.written[part].keys}

    def finish(self, save_configuration: Callable[[Path], None], report: str) -> None:
        """Write the index and the files of `save_configuration`; after that, the folder is a model.

        The report stays in the progress file until `forget`, for a run that is started again.
        """
        self.progress.report = report
        with self._in_first() as is_first:
            if is_first:
                self._save_progress()
                self._save_rest(save_configuration)

    def _save_rest(self, save_configuration: Callable[[Path], None]) -> None:
        written = self.progress.written
        weight_map = {key: self._path(part).name for part in self._parts for key in written[part].keys}
        index = {
            "metadata": {"total_size": sum(record.size for record in written.values())},
            "weight_map": dict(sorted(weight_map.items())),
        }
        for leftover in self.path.glob(".wanda-*"):  # of a run that was killed here; the folder is locked
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        with tempfile.TemporaryDirectory(dir=self.path, prefix=".wanda-") as temporary:
            save_configuration(Path(temporary))
            (Path(temporary) / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
            for file in sorted(Path(temporary).iterdir(), key=lambda file: file.name == "config.json"):
                if (target := self.path / file.name).is_dir():
                    shutil.rmtree(target)
                if file.is_file():
                    replace_file(file, target)
                else:
                    os.replace(file, target)

    def forget(self) -> None:
        """Delete the files that only a repeated run needs."""
        with self._in_first() as is_first:
            if is_first:
                (self.path / ROW_WEIGHTS_NAME).unlink(missing_ok=True)
                (self.path / PROGRESS_NAME).unlink(missing_ok=True)  # `shrink_from_disk` may have replaced the folder

    def close(self) -> None:
        """Allow other runs to write into the folder; undo its making if nothing is pruned, as after a refusal."""
        if self._lock is not None:
            written, is_refused = self.progress.written, not self.progress.report
            if is_refused and written.keys() >= set(self._parts) and not any(part.layers for part in written.values()):
                for file in (self.path / ROW_WEIGHTS_NAME, *map(self._path, written)):
                    file.unlink(missing_ok=True)
            if self._is_begun and [file.name for file in self.path.iterdir()] == [PROGRESS_NAME]:
                (self.path / PROGRESS_NAME).unlink()
            if self._is_new and not any(self.path.iterdir()):
                self.path.rmdir()
            unlock(self._lock)
            self._lock = None


def _differences(begun: Mapping[str, Any], now: Mapping[str, Any], place: str = "") -> Iterator[str]:
    """Describe each difference, with the values of choices but without fingerprints."""
    for name in dict.fromkeys([*begun, *now]):
        first, second = begun.get(name), now.get(name)
        if isinstance(first, Mapping) and isinstance(second, Mapping):
            yield from _differences(first, second, name if place == "choices" else "choices")
        elif first != second:
            has_values = all(isinstance(each, str | int | float | None) for each in (first, second))
            label = place if name == "name" else name
            yield f"{label}={first!r}, but now it is {second!r}" if has_values else f"other {label}"


def _checksum(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while piece := opened.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def fingerprint(values: Any) -> str:
    """Return a hash of nested containers with tensors and plain values."""
    digest = hashlib.sha256()
    for piece in _pieces(values):
        digest.update(piece)
    return digest.hexdigest()


def _pieces(values: Any) -> Iterator[bytes]:
    if isinstance(values, Tensor):
        yield f"{values.dtype} {tuple(values.shape)}".encode()
        yield values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    elif isinstance(values, Mapping):
        for key in values:
            yield repr(key).encode()
            yield from _pieces(values[key])
    elif isinstance(values, list | tuple):
        yield f"{len(values)}".encode()
        for value in values:
            yield from _pieces(value)
    else:
        yield repr(values).encode()
