"""Write a model part by part, each into a safetensors file of its own."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from wanda_lightning.common.atomic_write import TEMPORARY, atomic_write, move_entries
from wanda_lightning.modules.loading import save_tokenizer
from wanda_lightning.streaming.checkpoint import Checkpoint

_INDEX = "model.safetensors.index.json"


class Shards:
    """A folder with one file for each part of a checkpoint; the files without which it is no model come last."""

    def __init__(self, folder: Path, parts: Sequence[str]) -> None:
        self.folder, self._parts = folder, list(parts)

    def path(self, part: str) -> Path:
        """Return the file of a part."""
        number = self._parts.index(part) + 1
        return self.folder / f"model-{number:05d}-of-{len(self._parts):05d}.safetensors"

    def write(self, part: str, tensors: Mapping[str, Tensor]) -> int:
        """Write a part, and return its bytes; a part without tensors has no file."""
        if tensors:
            with atomic_write(self.path(part)) as new:
                save_file(dict(tensors), new, metadata={"format": "pt"})
        return sum(tensor.nbytes for tensor in tensors.values())

    def finish(self, checkpoint: Checkpoint, keys: Mapping[str, Sequence[str]], size: int, tokenizer: Any) -> None:
        """Write the index, from the names of the tensors of each part and the bytes of all, and the configuration."""
        weight_map = {key: self.path(part).name for part in keys for key in keys[part]}
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        for leftover in self.folder.glob(f"{TEMPORARY}*"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        temporary = Path(tempfile.mkdtemp(dir=self.folder, prefix=TEMPORARY))  # saving deletes weights beside it
        checkpoint.save_configuration(temporary)
        if tokenizer is not None:
            save_tokenizer(tokenizer, temporary)
        (temporary / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        move_entries(temporary, self.folder)
