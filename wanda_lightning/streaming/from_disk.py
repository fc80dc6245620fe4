"""Prune a model that does not fit in memory."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from wanda_lightning.common.atomic_write import resolve_path
from wanda_lightning.common.checks import shown
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.model_source import ModelSource
from wanda_lightning.config import PruningChoices, PruningConfig, Unpack, check_choices
from wanda_lightning.engine.prune import prune_as
from wanda_lightning.planning.plan import make_plan
from wanda_lightning.report import PruningReport
from wanda_lightning.streaming.checkpoint import RESIDENT, Checkpoint
from wanda_lightning.streaming.output_folder import OutputFolder, fingerprint
from wanda_lightning.streaming.streamed_weights import StreamedWeights

log = logging.getLogger(__name__)

# To the weights: where they are, and what has written them.
_UNRELATED = (
    "_name_or_path",
    "transformers_version",
)


def prune_from_disk(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    batches: Iterable[Any],
    sparsity: float = 0.5,
    *,
    dtype: str = "auto",
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

    Tensors that transformers does not load, such as layers for multi-token prediction, are copied as stored. With
    `pattern="experts"` they are left out, since they may not fit fewer experts. A note in the report says so.

    Args:
        source: Hub id or local folder.
        output: A folder that is empty, does not exist, or was left by an interrupted run with the same arguments.
        batches: Calibration batches; all are kept in memory.
        sparsity: Fraction of the pruned layers' weights that become zero, in [0, 1).
        dtype: `"auto"` as stored, `"float32"`, `"bfloat16"` or `"float16"`.
        revision: Revision of a hub model.
        cache_dir: Folder for downloads from the hub.
        trust_remote_code: Run the code that comes with a hub model.
        tokenizer: Saved with the model if given, by its `save_pretrained`.
        forward: Called with the model and one batch, to run it; by default as in `prune`.
        progress: Show a bar.
        device: Where the model computes, for example `"cuda"`. Two blocks and the activations are there.
        **choices: The other arguments of `PruningConfig.from_names`. Choices that need the whole model are refused.

    Raises:
        OSError: If the source cannot be read or the output cannot be written.
        ValueError: If a choice needs the whole model, or the output was begun with other choices.
    """
    check_choices(choices)
    config = PruningConfig.from_names(sparsity, **choices)
    place = ModelSource(source, revision or "main", cache_dir, trust_remote_code)
    with pruned_from_disk(
        config, place, output, batches, dtype, tokenizer, forward, progress, device
    ) as report:
        return report


@contextmanager
def pruned_from_disk(
    config: PruningConfig,
    source: ModelSource,
    output: str | os.PathLike[str],
    batches: Iterable[Any],
    dtype: str = "auto",
    tokenizer: Any = None,
    forward: Callable[[nn.Module, Any], object] | None = None,
    progress: bool = True,
    device: str = "cpu",
) -> Iterator[PruningReport]:
    """Prune from disk with resolved choices, and yield the report; the output is complete.

    If this block fails or is killed, another run with the same arguments yields the same report at once.
    """
    refuse_whole_model(config)
    if source.path.is_dir() and resolve_path(output).is_relative_to(resolve_path(source.path)):
        raise UserError(
            f"output must lie outside of the source {source}, but it is {output}. Choose another folder."
        )
    if not (tokenizer is None or hasattr(tokenizer, "save_pretrained")):
        raise UserError(f"tokenizer must be one of transformers, but it is {shown(tokenizer)}.")
    held = list(batches)
    checkpoint = Checkpoint(source, dtype, device)
    plan = make_plan(config, checkpoint.model, by_block=True)
    described = checkpoint.model.config.to_dict()
    made_with = {  # the choices and data that determine the result
        **config.describe(),
        "dtype": str(checkpoint.model.dtype),
        "device": checkpoint.device.type,
        "calibration data": [fingerprint(held)],
        "config.json": fingerprint({k: v for k, v in described.items() if k not in _UNRELATED}),
        **{f"weights in {file.name}": stamp for file, stamp in checkpoint.files.items()},
    }
    drops_experts = config.pattern.drops_experts
    copied = (
        {}
        if drops_experts
        else {f"copied from {path.name}": path for path in checkpoint.not_loaded}
    )
    folder = OutputFolder(output, made_with, [RESIDENT, *checkpoint.blocks, *copied])
    whole = folder.progress.report
    if not whole or drops_experts:  # then the configuration must change, too
        weights = StreamedWeights(checkpoint, folder)
        run = None if forward is None else partial(forward, checkpoint.model)
        is_by_block = drops_experts and plan.config.sequential == "none"  # one after the other
        with nullcontext() if is_by_block else weights.blocks.loading():
            report = prune_as(plan, held, forward=run, progress=progress, store=weights)
    for part, path in copied.items():
        if part not in folder.written:
            folder.save(part, checkpoint.read_not_loaded(path))
    note = (
        checkpoint.leave_out()
        if drops_experts
        else checkpoint.note_on_not_loaded("copied as stored")
    )
    if whole:
        report = PruningReport.from_json(whole)
    elif note:
        log.warning(note)
        report = replace(report, notes=(*report.notes, note))
    folder.finish(checkpoint, tokenizer, report.to_json())
    yield report
    folder.forget()


def refuse_whole_model(config: PruningConfig) -> None:
    """Refuse choices that need all weights, or the Gram matrices of all layers, at once."""
    whole = "needs the whole model in memory"
    grams = "needs the Gram matrices of all layers in memory"
    is_one_pass = config.sequential == "none"
    recovery = config.shown("recovery")
    weighs = config.pattern.weigh_rows is not False
    uniform = "'uniform'" + " and pattern='unstructured_layer'" * weighs
    rows = (
        (config.allocation.reads_gradients, "allocation", f"reads gradients, and {whole}", uniform),
        (weighs, "pattern", f"reads gradients, and {whole}", "'unstructured_layer'"),
        (
            is_one_pass and config.recovery.trains_blocks,
            "sequential",
            f"with {recovery} trains blocks in memory",
            "'block'",
        ),
        (
            is_one_pass and "gram" in config.needs,
            "sequential",
            f"with {config.shown('solver')} {grams}",
            "'block'",
        ),
        ("gram" in config.allocation.needs, "allocation", grams, "'owl'"),
        (config.recovery.reads_batches, "recovery", whole, "'none' or 'reconstruct'"),
    )
    for applies, option, reason, instead in rows:
        if applies:
            asked = f"method={config.preset!r}" if config.preset else config.shown(option)
            raise UserError(
                f"{asked} {reason}, but the model is read block by block. Use {option}={instead}, or prune in memory."
            )
