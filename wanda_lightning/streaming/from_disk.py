"""Prune a model that does not fit in memory."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from wanda_lightning.common.aliases import Kwargs, StrPath
from wanda_lightning.common.atomic_write import resolve_path
from wanda_lightning.common.checks import shown
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.model_source import ModelSource
from wanda_lightning.config import PruningChoices, PruningConfig, Unpack, config_of
from wanda_lightning.experts.mixture_checks import find_mixtures
from wanda_lightning.experts.remove_experts import remove_experts
from wanda_lightning.loop.plan import Plan, make_plan
from wanda_lightning.loop.steps import begin
from wanda_lightning.report import PruningReport
from wanda_lightning.streaming.checkpoint import RESIDENT, Checkpoint
from wanda_lightning.streaming.not_loaded import (
    Entries,
    largest_routers,
    leave_out,
    note_on_copied,
    read_not_loaded,
)
from wanda_lightning.streaming.output_folder import OutputFolder, fingerprint
from wanda_lightning.streaming.quantized_checkpoint import refuse_changed_weights
from wanda_lightning.streaming.streamed_weights import StreamedWeights
from wanda_lightning.verbs.prune_weights import prune_weights
from wanda_lightning.verbs.remove_units import remove_units

log = logging.getLogger(__name__)

_REMOVALS = {"weights": prune_weights, "units": remove_units, "experts": remove_experts}
# To the weights: where they are, and what has written them.
_UNRELATED = ("_name_or_path", "transformers_version")


def prune_from_disk(
    source: StrPath,
    output: StrPath,
    batches: Iterable[Any],
    sparsity: float | PruningConfig = 0.5,
    *,
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    cache_dir: str | None = None,
    trust_remote_code: bool = False,
    tokenizer: Any = None,
    forward: Callable[[nn.Module, Any], object] | None = None,
    progress: bool = True,
    device: str = "cpu",
    **choices: Unpack[PruningChoices],
) -> PruningReport:
    """Prune a language model in safetensors block by block, with at most two blocks in memory; return the report.

    A block is read when the calibration batches arrive at it, and written when they leave it. The output is a folder
    for `from_pretrained`, with the weights that `prune` computes. An interrupted run continues when it is called again
    with the same arguments (`forward` is not compared); until it has finished, the output is not a model.

    Tensors that transformers does not load, such as layers for multi-token prediction, are copied as stored. A note in
    the report says so.

    Args:
        source: Hub id or local folder.
        output: A folder that is empty, does not exist, or was left by an interrupted run with the same arguments.
        batches: Calibration batches; all are kept in memory.
        sparsity: Fraction of the pruned layers' weights that become zero, in [0, 1); or a `PruningConfig`.
        dtype: `"auto"` as stored, or float32, bfloat16 or float16, as a name or a `torch.dtype`.
        revision: Revision of a hub model.
        cache_dir: Folder for downloads from the hub.
        trust_remote_code: Run the code that comes with a hub model.
        tokenizer: Saved with the model if given, by its `save_pretrained`.
        forward: Runs a batch through the model, by default as in `prune`. It gets the model, too, which only exists
            while this function runs.
        progress: Show a bar.
        device: Where the model computes, for example `"cuda"`. Two blocks and the activations are there.
        **choices: The other arguments of `PruningConfig`. Choices that need the whole model are refused.

    Raises:
        OSError: If the source cannot be read or the output cannot be written.
        ValueError: If a choice needs the whole model, or the output was begun with other choices.
    """
    config = config_of(sparsity, prune_from_disk, **choices)
    place = ModelSource(source, revision or "main", cache_dir, trust_remote_code)
    with pruned_from_disk(
        config, place, output, batches, dtype, tokenizer, forward, progress, device
    ) as report:
        return report


@contextmanager
def pruned_from_disk(
    config: PruningConfig,
    source: ModelSource,
    output: StrPath,
    batches: Iterable[Any],
    dtype: str | torch.dtype = "auto",
    tokenizer: Any = None,
    forward: Callable[[nn.Module, Any], object] | None = None,
    progress: bool = True,
    device: str = "cpu",
) -> Iterator[PruningReport]:
    """Prune from disk with resolved choices, and yield the report; the output is complete.

    Choices of `shrink` set hidden units to zero, or take experts out. A layer for multi-token prediction then keeps as
    many experts as the others, those with the largest rows in its router; if it has no such router, all such layers are
    left out.

    If this block fails or is killed, another run with the same arguments yields the same report at once.
    """
    refuse_whole_model(config)
    _check_arguments(source, output, tokenizer)
    batches = list(batches)
    checkpoint = Checkpoint(source, dtype, device)
    removes_experts = config.pattern.removes == "experts"
    if not removes_experts:
        refuse_changed_weights(checkpoint.quantization, str(source))
    plan = make_plan(config, checkpoint.model, by_block=True)

    entries = _entries_of_not_loaded(plan, checkpoint)
    copied = {}
    if entries is not None:
        copied = {f"copied from {path.name}": path for path in checkpoint.not_loaded}

    parts = [RESIDENT, *checkpoint.blocks, *copied]
    folder = OutputFolder(output, _what_determines(config, checkpoint, batches), parts)
    finished_report = folder.progress.report
    # A finished run is repeated if shapes change, since that adapts the configuration; its report is replaced below.
    if not finished_report or removes_experts:
        weights = StreamedWeights(checkpoint, folder)
        forward_batch = None if forward is None else partial(forward, checkpoint.model)
        with weights.blocks.loading():
            run = begin(plan, batches, forward_batch, progress=progress, store=weights)
            report = _REMOVALS[config.pattern.removes](run)
    for part, path in copied.items():
        if part not in folder.written:
            folder.save(part, read_not_loaded(checkpoint, path, entries or {}))

    note = leave_out(checkpoint) if entries is None else note_on_copied(checkpoint, entries)
    if finished_report:
        report = PruningReport.from_json(finished_report)
    elif note:
        log.warning(note)
        report = replace(report, notes=(*report.notes, note))
    folder.finish(checkpoint, tokenizer, report.to_json())
    yield report
    folder.forget()


def _check_arguments(source: ModelSource, output: StrPath, tokenizer: Any) -> None:
    """Refuse an output inside of the source, and what is no tokenizer."""
    if source.path.is_dir() and resolve_path(output).is_relative_to(resolve_path(source.path)):
        raise UserError(
            f"output must lie outside of the source {source}, but it is {output}. Choose another folder."
        )
    if not (tokenizer is None or hasattr(tokenizer, "save_pretrained")):
        raise UserError(f"tokenizer must be one of transformers, but it is {shown(tokenizer)}.")


def _entries_of_not_loaded(plan: Plan, checkpoint: Checkpoint) -> Entries | None:
    """Return what is left of layers for multi-token prediction, which no batch reaches; None if they are left out."""
    config = plan.config
    if config.pattern.removes != "experts":
        return {}
    mixture = find_mixtures(config, checkpoint.model, plan.inventory)[0]
    return largest_routers(checkpoint, config, mixture)


def _what_determines(config: PruningConfig, checkpoint: Checkpoint, batches: list[Any]) -> Kwargs:
    """Return the choices and data that determine the result, which a run that continues another must share."""
    model_config = checkpoint.model.config.to_dict()
    related = {key: value for key, value in model_config.items() if key not in _UNRELATED}
    determines = {
        **config.describe(),
        "dtype": str(checkpoint.model.dtype),
        "quantization": fingerprint(checkpoint.quantization),
        "output": "as stored" if checkpoint.copies else "as computed",
        "device": checkpoint.device.type,
        "calibration data": [fingerprint(batches)],
        "config.json": fingerprint(related),
    }
    for file, stamp in checkpoint.files.items():
        determines[f"weights in {file.name}"] = stamp
    return determines


def refuse_whole_model(config: PruningConfig) -> None:
    """Refuse choices that need all weights, or the Gram matrices of all layers, at once."""
    for option, reason, instead in _reasons_for_whole_model(config):
        asked = f"method={config.preset!r}" if config.preset else config.shown(option)
        raise UserError(
            f"{asked} {reason}, but the model is read block by block. Use {instead}, or change the model in memory."
        )


def _reasons_for_whole_model(config: PruningConfig) -> Iterator[tuple[str, str, str]]:
    """Yield an option that needs more than a block, why, and what to use instead."""
    whole = "needs the whole model in memory"
    grams = "needs the Gram matrices of all layers in memory"
    weighs_rows = config.pattern.weigh_rows is not False
    if config.allocation.reads_gradients:
        instead = "by='equal'" if config.pattern.removes == "units" else "allocation='uniform'"
        if weighs_rows:
            instead += " and pattern='unstructured_layer'"
        yield "allocation", f"reads gradients, and {whole}", instead
    if weighs_rows:
        yield "pattern", f"reads gradients, and {whole}", "pattern='unstructured_layer'"
    if config.sequential == "none" and config.recovery.trains_blocks:
        yield (
            "sequential",
            f"with {config.shown('recovery')} trains blocks in memory",
            "sequential='block'",
        )
    if config.sequential == "none" and "gram" in config.needs:
        yield "sequential", f"with {config.shown('solver')} {grams}", "sequential='block'"
    if "gram" in config.allocation.needs:
        yield "allocation", grams, "allocation='owl'"
    if config.recovery.reads_batches:
        yield "recovery", whole, "recovery='none' or 'reconstruct'"
