"""Take hidden units that are zero out of a model that does not fit in memory."""

from __future__ import annotations

import os
from contextlib import ExitStack
from functools import partial
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
from wanda_lightning.streaming.output_folder import Shards


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
        self.model, self.result, self._checkpoint = checkpoint.model, Shrunk(), checkpoint
        self._shards = Shards(folder, [RESIDENT, *checkpoint.blocks])
        before = sum(parameter.numel() for parameter in self.model.parameters())
        self.result.parameters = before, before

    def run(self) -> None:
        """Run a small batch through the model, and write every block."""
        model: Any = self.model
        with pruning_mode(model), ExitStack() as hooks:
            for name in self._checkpoint.blocks:
                block = model.get_submodule(name)
                enter, leave = partial(self._enter, name), partial(self._leave, name)
                hooks.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
                hooks.callback(block.register_forward_hook(leave).remove)
            model(**example_batch(model))
        for name in self._checkpoint.blocks:
            if name not in self._shards.written:  # the batch does not reach it
                self._checkpoint.load(name)
                self._save(name)
                self._checkpoint.unload(name)
        self._save(RESIDENT)

    def _enter(self, name: str, block: nn.Module, args: Any, kwargs: Any) -> None:
        if name in self._shards.written:  # a block that runs twice
            self._checkpoint.load(name, self._shards.stored(name))
            return

        def forward(batch: Any) -> object:
            args, kwargs = clone_arguments(batch)
            return type(block).forward(block, *args, **kwargs)  # without the hooks of the block

        self._checkpoint.load(name)
        found = shrink(block, (args, kwargs), forward)
        self.result.layers |= {f"{name}.{reader}": widths for reader, widths in found.layers.items()}
        self.result.unproven += found.unproven
        before, after = self.result.parameters
        self.result.parameters = before, after - found.parameters[0] + found.parameters[1]
        self._save(name)

    def _leave(self, name: str, *_: object) -> None:
        self._checkpoint.unload(name)

    def _save(self, part: str) -> None:
        self._shards.save(part, self._checkpoint.stored(part))

    def finish(self, tokenizer: Any) -> None:
        """Write the files without which the folder is no model."""
        self._shards.write_rest(self._checkpoint, tokenizer)
