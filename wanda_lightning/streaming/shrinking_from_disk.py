"""Take hidden units that are zero out of a model that does not fit in memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from wanda_lightning.calibration.cloning import clone_arguments
from wanda_lightning.calibration.mode import pruning_mode
from wanda_lightning.common.atomic_write import atomic_folder
from wanda_lightning.common.model_source import ModelSource
from wanda_lightning.modules.loading import load_own_tokenizer
from wanda_lightning.shrinking import Shrunk, example_batch, fit_configuration, shrink, write_modeling_file
from wanda_lightning.streaming.checkpoint import RESIDENT, Checkpoint
from wanda_lightning.streaming.shards import Shards


def shrink_from_disk(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    overwrite: bool = False,
    *,
    dtype: str = "auto",
    revision: str | None = None,
    cache_dir: str | None = None,
    trust_remote_code: bool = False,
) -> Shrunk:
    """Do what `shrink` does for a language model in safetensors, with one block in memory.

    A small batch runs through the model once; each block is read when it arrives there, and written without the units
    when it leaves. Units outside of blocks stay.

    Args:
        source: Hub id or local folder.
        output: Folder to write; it appears when it is complete.
        overwrite: Replace a folder that is not empty, with everything in it.
        dtype: `"auto"` as stored, `"float32"`, `"bfloat16"` or `"float16"`.
        revision: Revision of a hub model.
        cache_dir: Folder for downloads from the hub.
        trust_remote_code: Run the code that comes with a hub model.

    Returns:
        What was taken out.

    Raises:
        ValueError: If nothing can be removed, or if the model cannot be read block by block.
        FileExistsError: If the folder is not empty and `overwrite` is false.
    """
    where = ModelSource(os.fspath(source), revision or "main", cache_dir, trust_remote_code)
    with atomic_folder(output, overwrite) as folder:
        stream = _Stream(Checkpoint(where, dtype), folder)
        stream.run()
        stream.result.refuse_nothing()
        stream.result.misfit, _ = fit_configuration(stream.model)
        write_modeling_file(stream.model, folder)
        stream.finish(load_own_tokenizer(where))
    return stream.result


class _Stream:
    """Reads, shrinks and writes one block after the other."""

    def __init__(self, checkpoint: Checkpoint, folder: Path) -> None:
        self.model, self.result = checkpoint.model, Shrunk()
        self._checkpoint = checkpoint
        self._parts = [RESIDENT, *checkpoint.blocks]
        self._shards = Shards(folder, self._parts)
        self._written: dict[str, list[str]] = {}  # by part: names of its tensors
        self._size = 0
        before = sum(parameter.numel() for parameter in self.model.parameters())
        self.result.parameters = before, before

    def run(self) -> None:
        """Run a small batch through the model, and write every block."""
        model: Any = self.model
        with pruning_mode(model), self._reading_blocks():
            model(**example_batch(model))
        for part in self._parts:
            if part not in self._written:  # the batch does not reach it
                if part != RESIDENT:
                    self._checkpoint.load(part)
                self._write(part)
                if part != RESIDENT:
                    self._checkpoint.unload(part)

    @contextmanager
    def _reading_blocks(self) -> Iterator[None]:
        with ExitStack() as hooks:
            for name in self._checkpoint.blocks:
                block = self.model.get_submodule(name)

                def enter(block: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                    if name in self._written:  # a block that runs twice
                        self._checkpoint.load(name, {self._shards.path(name): self._written[name]})
                    else:
                        self._checkpoint.load(name)
                        self._shrink(name, block, args, kwargs)
                        self._write(name)

                def leave(*_: object, name: str = name) -> None:
                    self._checkpoint.unload(name)

                hooks.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
                hooks.callback(block.register_forward_hook(leave).remove)
            yield

    def _shrink(self, name: str, block: nn.Module, args: Any, kwargs: Any) -> None:
        def forward(batch: Any) -> object:
            args, kwargs = clone_arguments(batch)
            return type(block).forward(block, *args, **kwargs)  # without the hooks of the block

        found = shrink(block, (args, kwargs), forward)
        self.result.layers |= {f"{name}.{reader}": widths for reader, widths in found.layers.items()}
        self.result.unproven += found.unproven
        before, after = self.result.parameters
        self.result.parameters = before, after - found.parameters[0] + found.parameters[1]

    def _write(self, part: str) -> None:
        tensors = self._checkpoint.stored(part)
        self._written[part] = list(tensors)
        self._size += self._shards.write(part, tensors)

    def finish(self, tokenizer: Any) -> None:
        """Write the files without which the folder is no model."""
        self._shards.finish(self._checkpoint, self._written, self._size, tokenizer)
