"""The folder of a model that is written part by part, and resumed after a crash."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from wanda_lightning.calibration.trees import map_tensors
from wanda_lightning.common.aliases import Kwargs, StrPath
from wanda_lightning.common.atomic_write import (
    TEMPORARY,
    atomic_write,
    list_entries,
    move_entries,
    require_writable,
    resolve_path,
    write_text,
)
from wanda_lightning.common.checks import Number, check_values
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.wording import one_line
from wanda_lightning.models import SkippedMatrix
from wanda_lightning.report import PrunedLayer
from wanda_lightning.report.records import as_json, from_parsed
from wanda_lightning.streaming.checkpoint import Checkpoint, Keys

PROGRESS_NAME = ".pruning_progress.json"
_VERSION = 6  # of the progress file


@dataclass(frozen=True)
class PartRecord:
    """The record of a part: its layers, and the file that holds it."""

    layers: list[PrunedLayer] = field(default_factory=list)
    skipped: list[SkippedMatrix] = field(default_factory=list)
    few_tokens: dict[str, int] = field(default_factory=dict)  # by expert's layer
    # Hidden units that are zero, by the layer that reads them.
    zero_units: dict[str, int] = field(default_factory=dict)
    zeros: int = 0
    keys: list[str] = field(default_factory=list)  # names of the tensors in its file
    size: int = 0  # of the tensors, in bytes


class Shards:
    """A folder with one file for each part of a checkpoint; the files without which it is no model come last."""

    def __init__(self, folder: Path, parts: Sequence[str]) -> None:
        self.folder = folder
        self.parts = list(parts)
        self.written: dict[str, PartRecord] = {}

    def path(self, part: str) -> Path:
        """Return the file of a part; one without tensors has no file."""
        number = self.parts.index(part) + 1
        return self.folder / f"model-{number:05d}-of-{len(self.parts):05d}.safetensors"

    def save(
        self, part: str, tensors: Mapping[str, Tensor], record: PartRecord = PartRecord()
    ) -> None:
        """Write a part, and add its tensors to its record."""
        if tensors:
            with atomic_write(self.path(part)) as new:
                save_file(dict(tensors), new, metadata={"format": "pt"})
        size = sum(tensor.nbytes for tensor in tensors.values())
        self.written[part] = replace(record, keys=list(tensors), size=size)

    def stored(self, part: str) -> Keys:
        """Return the file and the names of the tensors of a written part."""
        return {self.path(part): self.written[part].keys}

    def write_rest(self, checkpoint: Checkpoint, tokenizer: Any) -> None:
        """Write the index and the configuration."""
        weight_map = {
            key: self.path(part).name
            for part, record in self.written.items()
            for key in record.keys
        }
        size = sum(record.size for record in self.written.values())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        for leftover in self.folder.glob(f"{TEMPORARY}*"):
            if any(leftover.glob("*.safetensors")):
                continue  # it may be a whole model
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()

        # In a folder of its own, because saving a configuration deletes weights beside it.
        temporary = Path(tempfile.mkdtemp(dir=self.folder, prefix=TEMPORARY))
        checkpoint.save_configuration(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        text = json.dumps(index, indent=2) + "\n"
        (temporary / "model.safetensors.index.json").write_text(text, encoding="utf-8")
        move_entries(temporary, self.folder)


@dataclass
class _Progress:
    """The content of the progress file."""

    made_with: Kwargs  # choices and data that determine the result
    sparsities: dict[str, float] = field(default_factory=dict)  # of each layer, once it is known
    written: dict[str, PartRecord] = field(default_factory=dict)  # by part
    report: str = ""  # of the finished pruning, as JSON


class OutputFolder(Shards):
    """The folder of a pruned model.

    The folder is empty, does not exist, or was left by an interrupted run with the same choices and data, `made_with`;
    any other folder is refused.
    """

    def __init__(self, folder: StrPath, made_with: Mapping[str, Any], parts: Sequence[str]) -> None:
        super().__init__(resolve_path(folder), parts)
        self._file = self.folder / PROGRESS_NAME
        self.progress = _Progress(
            json.loads(json.dumps({"version": _VERSION, **made_with}, default=str))
        )
        require_resumable(folder)
        if self._file.is_file():
            self._resume(folder)
        self.written = self.progress.written

    def _resume(self, folder: object) -> None:
        """Continue an interrupted run with the same choices; parts whose files are missing are written again."""
        try:
            stored = json.loads(self._file.read_text(encoding="utf-8"))
            begun: _Progress = from_parsed(_Progress, stored)
            check_values(Number(minimum=0, below=1), **begun.sparsities)
        except ValueError as error:
            raise UserError(
                f"{self._file} is not the record of an interrupted run of this version: {one_line(error)} Delete "
                f"{folder} to begin anew, or choose another folder."
            ) from error

        before = begun.made_with
        now = self.progress.made_with
        differing = [name for name in before | now if before.get(name) != now.get(name)]
        if begun.written and differing:
            raise UserError(
                f"{folder} was begun with other choices, data or weights: {', '.join(differing)}. Use the same to go "
                "on, or another folder."
            )

        for part, record in begun.written.items():
            if not record.keys or self.path(part).is_file():
                self.progress.written[part] = record
        if not differing:
            self.progress.sparsities = begun.sparsities
        if self.progress.written.keys() >= set(self.parts):
            self.progress.report = begun.report

    def save(
        self, part: str, tensors: Mapping[str, Tensor], record: PartRecord = PartRecord()
    ) -> None:
        """Write a part and its record; refuse to mix the parts of two runs."""
        # Checked at each write, because another run may have begun in the same folder since this one.
        if self._file.is_file():
            stored = json.loads(self._file.read_text(encoding="utf-8"))
            is_of_another = stored["written"] and stored["made_with"] != self.progress.made_with
        else:
            is_of_another = bool(list_entries(self.folder))
        if is_of_another:
            raise UserError(
                f"{self.folder} must be written by one run, but another one has. Choose another folder."
            )
        super().save(part, tensors, record)
        self.save_progress()

    def save_progress(self, **changes: Any) -> None:
        """Write the progress, with new values of its fields, for a run that is started again."""
        self.progress = replace(self.progress, **changes)
        write_text(self._file, as_json(asdict(self.progress)))

    def finish(self, checkpoint: Checkpoint, tokenizer: Any, report: str) -> None:
        """Write the files without which the folder is no model; the report stays in the progress until `forget`."""
        self.save_progress(report=report)
        self.write_rest(checkpoint, tokenizer)

    def forget(self) -> None:
        """Delete the files that only a repeated run needs."""
        self._file.unlink(missing_ok=True)  # `shrink_from_disk` may have replaced the folder


def require_resumable(path: StrPath) -> None:
    """Raise an OSError for a folder that is neither empty nor left by an interrupted run."""
    require_writable(path, overwrite=True, kind="folder")
    target = resolve_path(path)
    if list_entries(target) and not (target / PROGRESS_NAME).is_file():
        raise FileExistsError(
            f"{path} is not empty, and no interrupted run left it. Choose another one, or empty it."
        )


def fingerprint(values: Any) -> str:
    """Return a hash of nested containers with tensors and plain values."""

    def content(tensor: Tensor) -> tuple[Any, ...]:
        octets = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        content_hash = hashlib.sha256(octets.numpy().tobytes()).hexdigest()
        return tensor.dtype, tuple(tensor.shape), content_hash

    return hashlib.sha256(repr(map_tensors(content, values)).encode()).hexdigest()
