"""A model folder that is written part by part, and resumed after a crash."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from wanda_lightning.common.atomic_write import atomic_write, list_entries, require_writable, resolve_path
from wanda_lightning.common.checks import Number, check_values
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.words import one_line
from wanda_lightning.models import SkippedMatrix
from wanda_lightning.parallel import SINGLE_PROCESS, Processes
from wanda_lightning.report import PrunedLayer
from wanda_lightning.report.records import as_json, from_parsed
from wanda_lightning.streaming.checkpoint import Checkpoint
from wanda_lightning.streaming.shards import Shards

PROGRESS_NAME, _ROW_WEIGHTS_NAME = ".pruning_progress.json", ".pruning_row_weights.safetensors"
_VERSION = 2  # of the progress file


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


@dataclass
class Progress:
    """The content of the progress file."""

    made_with: dict[str, Any]  # choices and data that determine the result
    sparsities: dict[str, float] = field(default_factory=dict)  # of each layer, once it is known
    has_row_weights: bool = False
    written: dict[str, PartRecord] = field(default_factory=dict)  # by part
    report: str = ""  # of the finished pruning, as JSON


class OutputFolder:
    """The folder of a pruned model, with one safetensors file for each part.

    A part is written as a whole, and the files without which the folder is not a model come last; of several processes,
    only the first one writes. The folder is empty, does not exist, or was left by an interrupted run with the same
    choices and data, `made_with`; any other folder is refused.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        made_with: Mapping[str, Any],
        parts: Sequence[str],
        processes: Processes = SINGLE_PROCESS,
    ) -> None:
        self.path, self._parts, self._processes = resolve_path(folder), list(parts), processes
        self._shards = Shards(self.path, parts)
        self.progress = Progress(json.loads(json.dumps({"version": _VERSION, **made_with}, default=str)))
        with self._in_first() as is_first:
            if is_first:
                require_resumable(folder)
                if (self.path / PROGRESS_NAME).is_file():
                    self._resume(folder)
        self.progress = processes.broadcast(self.progress, 0)

    @contextmanager
    def _in_first(self) -> Iterator[bool]:
        """Yield True in the first process, which writes, and False in the others, which wait for it."""
        with self._processes.fail_together():
            yield self._processes.rank == 0

    def _resume(self, folder: object) -> None:
        """Continue an interrupted run with the same choices; parts whose files are missing are written again."""
        own, file = self.progress, self.path / PROGRESS_NAME
        try:
            begun: Progress = from_parsed(Progress, json.loads(file.read_text(encoding="utf-8")))
            check_values(Number(minimum=0, below=1), **begun.sparsities)
        except ValueError as error:
            raise UserError(
                f"{file} is not the record of an interrupted run of this version: {one_line(error)} Delete {folder} to "
                "begin anew, or choose another folder."
            ) from error
        differing = list(_differences(begun.made_with, own.made_with))
        if begun.written and differing:
            others = f" (and {len(differing) - 1} more)" if differing[1:] else ""
            raise UserError(
                f"{folder} was begun with {differing[0]}{others}. Use the same choices, data and model to go on, or "
                "another folder."
            )
        for part, record in begun.written.items():
            if not record.keys or self._shards.path(part).is_file():
                own.written[part] = record
        if not differing:
            own.sparsities, own.has_row_weights = begun.sparsities, begun.has_row_weights
        own.report = begun.report if own.written.keys() >= set(self._parts) else ""

    def save(self, part: str, tensors: Mapping[str, Tensor], record: PartRecord) -> None:
        """Write a part and its record in the first process; the others do not wait for it."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        self.progress.written[part] = replace(record, keys=list(tensors), size=size)
        if self._processes.rank == 0:
            self._require_own_folder()
            self._shards.write(part, tensors)
            self._save_progress()

    def _require_own_folder(self) -> None:
        """Refuse to mix the parts of two runs."""
        file = self.path / PROGRESS_NAME
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"written": list_entries(self.path)}
        if found["written"] and found.get("made_with") != self.progress.made_with:
            raise UserError(f"{self.path} must be written by one run, but another one has. Choose another folder.")

    def save_allocation(self, sparsities: Mapping[str, float], row_weights: Mapping[str, Tensor]) -> None:
        """Write the sparsity of each layer, and the row weights of those that have any."""
        self.progress.sparsities, self.progress.has_row_weights = dict(sparsities), bool(row_weights)
        with self._in_first() as is_first:
            if is_first and row_weights:
                with atomic_write(self.path / _ROW_WEIGHTS_NAME) as new:
                    save_file(dict(row_weights), new)
            if is_first:
                self._save_progress()

    def row_weights(self) -> dict[str, Tensor]:
        """Read the row weights; empty if no layer has any."""
        return load_file(self.path / _ROW_WEIGHTS_NAME) if self.progress.has_row_weights else {}

    def _save_progress(self) -> None:
        with atomic_write(self.path / PROGRESS_NAME) as new:
            new.write_text(as_json(asdict(self.progress)), encoding="utf-8")

    def stored(self, part: str) -> dict[Path, list[str]]:
        """Return the file and the names of the tensors of a written part."""
        return {self._shards.path(part): self.progress.written[part].keys}

    def finish(self, checkpoint: Checkpoint, tokenizer: Any, report: str) -> None:
        """Write the files without which the folder is no model.

        The report stays in the progress file until `forget`, for a run that is started again.
        """
        self.progress.report = report
        written = self.progress.written
        with self._in_first() as is_first:
            if is_first:
                self._save_progress()
                keys = {part: written[part].keys for part in self._parts}
                self._shards.finish(checkpoint, keys, sum(each.size for each in written.values()), tokenizer)

    def forget(self) -> None:
        """Delete the files that only a repeated run needs."""
        with self._in_first() as is_first:
            if is_first:
                for name in (_ROW_WEIGHTS_NAME, PROGRESS_NAME):
                    (self.path / name).unlink(missing_ok=True)  # `shrink_from_disk` may have replaced the folder


def require_resumable(path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Raise an OSError for a folder that is neither empty nor left by an interrupted run, whatever `overwrite` is."""
    require_writable(path, overwrite=True, kind="folder")
    target = resolve_path(path)
    if list_entries(target) and not (target / PROGRESS_NAME).is_file():
        raise FileExistsError(f"{path} is not empty, and no interrupted run left it. Choose another one, or empty it.")


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
