"""Shrink a model that does not fit in memory."""

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.nn import Module

from wanda_lightning.calibration.pruning_mode import pruning_mode
from wanda_lightning.calibration.trees import clone_arguments
from wanda_lightning.common.aliases import StrPath
from wanda_lightning.common.atomic_write import atomic_folder
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.evaluation_mode import one_thread
from wanda_lightning.common.model_source import ModelSource, load_config, load_tokenizer
from wanda_lightning.common.progress import ProgressBar
from wanda_lightning.config import PruningConfig, Unpack
from wanda_lightning.experts.mixture_checks import refuse_without_mixtures
from wanda_lightning.lightning_modules.model_loading import model_from_config
from wanda_lightning.loop.plan import make_plan
from wanda_lightning.report import PruningReport
from wanda_lightning.shrink_config import ShrinkChoices, ShrinkConfig
from wanda_lightning.streaming.checkpoint import RESIDENT, Checkpoint
from wanda_lightning.streaming.from_disk import pruned_from_disk, refuse_whole_model
from wanda_lightning.streaming.not_loaded import leave_out
from wanda_lightning.streaming.output_folder import Shards
from wanda_lightning.streaming.quantized_checkpoint import refuse_changed_weights, settings_of
from wanda_lightning.units.fit_configuration import fit_configuration, refuse_unloadable
from wanda_lightning.units.zero_units import Shrunk, example_batch, take_out_zero_units
from wanda_lightning.verbs.shrink import fitted_parts

log = logging.getLogger(__name__)


def shrink_from_disk(
    source: StrPath,
    output: StrPath,
    batches: Iterable[Any] | None = None,
    *,
    units: float | None = None,
    experts: float | None = None,
    max_size: str | None = None,
    overwrite: bool = False,
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    cache_dir: str | None = None,
    trust_remote_code: bool = False,
    tokenizer: Any = None,
    forward: Callable[[Module, Any], object] | None = None,
    progress: bool = True,
    device: str = "cpu",
    **choices: Unpack[ShrinkChoices],
) -> PruningReport:
    """Do what `shrink` does for a language model in safetensors, with at most two blocks in memory.

    An interrupted run with `units` or `experts` continues as that of `prune_from_disk`. Without them, a small batch
    runs through the model once, and each block is written without its zero units; units outside of blocks stay.

    With `experts`, the weights may be quantized as FP8 in blocks, MXFP4 or compressed-tensors. Each block is
    dequantized when it is read, and what is kept is copied byte for byte. With a `dtype`, the output is not quantized.
    A layer for multi-token prediction keeps as many experts as the others, those with the largest rows in its router.
    With units, such layers are left out. A note in the report says so.

    Args:
        source: Hub id or local folder.
        output: A folder that is empty, does not exist, or was left by an interrupted run with the same arguments.
        batches: Calibration batches as for `prune_from_disk`.
        units: Fraction of the hidden units that leave; not together with `experts`, which need a second run.
        experts: Fraction of the experts that leave.
        max_size: Size of the new model, such as `"60GB"`, in place of `experts`: as many experts stay as fit.
        overwrite: Without `units` and `experts`: replace a folder that is not empty, with everything in it.
        dtype: `"auto"` as stored, or float32, bfloat16 or float16, as a name or a `torch.dtype`.
        revision: Revision of a hub model.
        cache_dir: Folder for downloads from the hub.
        trust_remote_code: Run the code that comes with a hub model.
        tokenizer: Saved with the model if given; without `units` and `experts`, that of the source is.
        forward: Runs a batch through the model, as for `prune_from_disk`.
        progress: Show a bar.
        device: Where the model computes.
        **choices: The other arguments of `ShrinkConfig`. Choices that need the whole model are refused.

    Returns:
        The report, with the shapes of the larger model: what has left counts as sparsity.

    Raises:
        ValueError: If nothing can be removed, or if the model cannot be read block by block.
        FileExistsError: If the folder is not empty and `overwrite` is false.
    """
    where = ModelSource(os.fspath(source), revision or "main", cache_dir, trust_remote_code)
    config = ShrinkConfig(units=units, experts=experts, max_size=max_size, **choices)
    if not config.parts:
        started = time.perf_counter()
        taken = take_out_from_disk(where, output, overwrite, dtype)
        return taken.report(time.perf_counter() - started)

    parts: Sequence[PruningConfig] = config.parts
    if max_size is not None:
        dense = Checkpoint(where, dtype)
        parts = fitted_parts(parts, dense.model, max_size, log.info, dense.sizes())
    with changed_from_disk(
        parts, where, output, batches or [], dtype, tokenizer, forward, progress, device
    ) as report:
        return report


@contextmanager
def changed_from_disk(
    parts: Sequence[PruningConfig],
    source: ModelSource,
    output: StrPath,
    batches: Iterable[Any],
    dtype: str | torch.dtype = "auto",
    tokenizer: Any = None,
    forward: Callable[[Module, Any], object] | None = None,
    progress: bool = True,
    device: str = "cpu",
) -> Iterator[PruningReport]:
    """Prune or shrink from disk with resolved choices, and yield the report; the output is complete."""
    part = _only_part(parts)
    with pruned_from_disk(
        part, source, output, batches, dtype, tokenizer, forward, progress, device
    ) as report:
        # A small fraction may round to no unit of any layer; a note of the report says so.
        leaves = any(layer.target for layer in report.layers)
        if part.pattern.removes == "units" and leaves:
            zeros = ModelSource(os.fspath(output), trust_remote_code=source.trust_remote_code)
            taken = take_out_from_disk(zeros, output, overwrite=True)
            notes = (*report.notes, *taken.notes())
            report = replace(report, notes=notes).marked_as_shrunk()
        yield report


def refuse_from_disk(parts: Sequence[PruningConfig], source: ModelSource) -> None:
    """Refuse choices and models that cannot be changed from disk, before the model is measured."""
    part = _only_part(parts)
    refuse_whole_model(part)
    if part.pattern.removes == "experts":
        plan = make_plan(part, model_from_config(source), by_block=True)
        refuse_without_mixtures(part, plan.model, plan.inventory)
    else:
        refuse_changed_weights(settings_of(load_config(source), str(source)), str(source))


def _only_part(parts: Sequence[PruningConfig]) -> PruningConfig:
    """Return the only part; refuse several, which need a folder between them."""
    if len(parts) > 1:
        raise UserError(
            "From disk, units and experts leave in two runs, but both are given. Run it with units=, then with "
            "experts= on the output."
        )
    return parts[0]


def take_out_from_disk(
    source: ModelSource, output: StrPath, overwrite: bool, dtype: str | torch.dtype = "auto"
) -> Shrunk:
    """Take out the hidden units that are zero, and write the folder when it is complete; refuse a model without any."""
    with atomic_folder(output, overwrite) as folder:
        checkpoint = Checkpoint(source, dtype)
        refuse_changed_weights(checkpoint.quantization, str(source))
        shards = Shards(folder, [RESIDENT, *checkpoint.blocks])
        result = _shrink_parts(checkpoint, shards)
        if not result.layers:
            raise UserError(f"{result} Give units=0.5, for example.")
        result.misfit, _ = fit_configuration(checkpoint.model)
        result.note = leave_out(checkpoint)
        if result.note:
            log.warning(result.note)
        refuse_unloadable(checkpoint.model)
        shards.write_rest(checkpoint, load_tokenizer(source))
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

        def forward() -> object:
            inputs, options = clone_arguments((args, kwargs))
            return type(block).forward(block, *inputs, **options)  # without the hooks of the block

        bar.show(name)
        checkpoint.load(name)
        found = take_out_zero_units(block, forward, progress=False)
        for reader, record in found.layers.items():
            full_name = f"{name}.{reader}"
            result.layers[full_name] = replace(record, name=full_name)
        result.taken += found.taken
        result.units += found.units
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
