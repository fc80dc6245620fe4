"""Take hidden units that are zero out of a model that does not fit in memory."""

import logging
import os
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch.nn import Module

from wanda_lightning.calibration.pruning_mode import pruning_mode
from wanda_lightning.calibration.trees import clone_arguments
from wanda_lightning.common.aliases import StrPath
from wanda_lightning.common.atomic_write import atomic_folder
from wanda_lightning.common.evaluation_mode import one_thread
from wanda_lightning.common.model_source import ModelSource, load_tokenizer
from wanda_lightning.common.progress import ProgressBar
from wanda_lightning.streaming.checkpoint import RESIDENT, Checkpoint
from wanda_lightning.streaming.not_loaded import leave_out
from wanda_lightning.streaming.output_folder import Shards
from wanda_lightning.streaming.quantized_checkpoint import refuse_changed_weights
from wanda_lightning.units.fit_configuration import fit_configuration, refuse_unloadable
from wanda_lightning.units.shrink import Shrunk, example_batch, shrink

log = logging.getLogger(__name__)


def shrink_from_disk(
    source: StrPath,
    output: StrPath,
    overwrite: bool = False,
    *,
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    cache_dir: str | None = None,
    trust_remote_code: bool = False,
) -> Shrunk:
    """Do what `shrink` does for a language model in safetensors, with one block in memory.

    A small batch runs through the model once; each block is read when it arrives there, and written without the units
    when it leaves. Units outside of blocks stay. Tensors that transformers does not load, such as layers for
    multi-token prediction, are left out, since they may not fit the smaller model.

    Args:
        source: Hub id or local folder.
        output: Folder to write; it appears when it is complete.
        overwrite: Replace a folder that is not empty, with everything in it.
        dtype: `"auto"` as stored, or float32, bfloat16 or float16, as a name or a `torch.dtype`.
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
        checkpoint = Checkpoint(where, dtype)
        refuse_changed_weights(checkpoint.quantization, str(where))
        shards = Shards(folder, [RESIDENT, *checkpoint.blocks])
        result = _shrink_parts(checkpoint, shards)
        result.refuse_if_unchanged()
        result.misfit, _ = fit_configuration(checkpoint.model)
        result.note = leave_out(checkpoint)
        if result.note:
            log.warning(result.note)
        refuse_unloadable(checkpoint.model)
        shards.write_rest(checkpoint, load_tokenizer(where))
    return result


def _shrink_parts(checkpoint: Checkpoint, shards: Shards) -> Shrunk:
    """Run a small batch through the model, and write each part when it is shrunk."""
    model = checkpoint.model
    size = model.num_parameters()
    result = Shrunk(parameters=(size, size))
    bar = ProgressBar("Shrinking", len(checkpoint.blocks))

    def save(part: str) -> None:
        shards.save(part, checkpoint.as_stored(part))

    def enter(name: str, block: Module, args: Any, kwargs: Any) -> None:
        if name in shards.written:  # a block that runs twice
            checkpoint.load(name, shards.stored(name))
            return

        def forward(batch: Any) -> object:
            args, kwargs = clone_arguments(batch)
            return type(block).forward(block, *args, **kwargs)  # without the hooks of the block

        bar.show(name)
        checkpoint.load(name)
        found = shrink(block, (args, kwargs), forward)
        result.layers |= {f"{name}.{reader}": widths for reader, widths in found.layers.items()}
        result.unproven += found.unproven
        before, after = result.parameters
        result.parameters = before, after - found.parameters[0] + found.parameters[1]
        save(name)
        bar.advance()

    def leave(name: str, *_: object) -> None:
        checkpoint.unload(name)

    with pruning_mode(model), one_thread(), bar, ExitStack() as hooks:
        for name in checkpoint.blocks:
            block = model.get_submodule(name)
            hooks.enter_context(
                block.register_forward_pre_hook(partial(enter, name), with_kwargs=True)
            )
            hooks.enter_context(block.register_forward_hook(partial(leave, name)))
        model(**example_batch(model))
    # The batch does not reach the others.
    for name in checkpoint.blocks:
        if name not in shards.written:
            checkpoint.load(name)
            save(name)
            checkpoint.unload(name)
    save(RESIDENT)
    return result
