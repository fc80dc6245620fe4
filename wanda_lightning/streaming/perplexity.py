"""Measure the perplexity of a model that does not fit in memory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping, Sized
from functools import partial
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Any

from wanda_lightning.calibration.lockstep import lockstep
from wanda_lightning.calibration.mode import pruning_mode
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.model_source import ModelSource
from wanda_lightning.common.progress import ProgressBar
from wanda_lightning.common.words import as_size
from wanda_lightning.modules import WindowPerplexity
from wanda_lightning.modules.loading import check_causal
from wanda_lightning.streaming.block_loader import BlockLoader
from wanda_lightning.streaming.checkpoint import Checkpoint
from wanda_lightning.streaming.parking import parking_maker, refuse_parking

AT_ONCE = 32  # batches that pass through the model together


def perplexity_from_disk(
    source: str | os.PathLike[str],
    batches: Iterable[Mapping[str, Any]],
    *,
    dtype: str = "auto",
    progress: bool = True,
    park: str = "memory",
    parked_in: str | os.PathLike[str] | None = None,
    device: str = "cpu",
    revision: str | None = None,
    cache_dir: str | None = None,
    trust_remote_code: bool = False,
) -> float:
    """Return the perplexity of a language model in safetensors, with at most two blocks in memory.

    All weights are read once for every 32 batches.

    Args:
        source: Hub id or local folder.
        batches: Batches with `input_ids` and perhaps an `attention_mask`, each (samples, tokens).
        dtype: `"auto"` as stored, `"float32"`, `"bfloat16"` or `"float16"`.
        progress: Show a bar.
        park: Where the activations of batches are while they wait, as for `prune_from_disk`.
        parked_in: Folder for `park="disk"`; by default that of temporary files.
        device: Where the model computes.
        revision: Revision of a hub model.
        cache_dir: Folder for downloads from the hub.
        trust_remote_code: Run the code that comes with a hub model.

    Raises:
        ValueError: If no token of the batches has a next token.
    """
    refuse_parking(park, device)
    checkpoint = Checkpoint(ModelSource(source, revision or "main", cache_dir, trust_remote_code), dtype, device)
    check_causal(checkpoint.model)
    metric = WindowPerplexity().to(checkpoint.device)

    def measure(batch: Mapping[str, Any]) -> None:
        input_ids, mask = batch["input_ids"].to(checkpoint.device), batch.get("attention_mask")
        mask = None if mask is None else mask.to(checkpoint.device)
        metric.update(checkpoint.model(input_ids, attention_mask=mask, use_cache=False).logits, input_ids, mask)

    make_parking = parking_maker(park, checkpoint.device, Path(parked_in or tempfile.gettempdir()))
    modules = [checkpoint.model.get_submodule(block) for block in checkpoint.blocks]
    remaining, total = iter(batches), None
    if isinstance(batches, Sized):
        total = ceil(len(batches) / AT_ONCE) * len(checkpoint.blocks)
    with pruning_mode(checkpoint.model), ProgressBar("Measuring", total, progress) as bar:
        while group := list(islice(remaining, AT_ONCE)):
            blocks = BlockLoader(checkpoint)
            with blocks.loading():
                forwards = [partial(measure, batch) for batch in group]
                stops = lockstep(forwards, modules, names=checkpoint.blocks, to_end=True, make_parking=make_parking)
                for stop in stops:
                    here = checkpoint.blocks[stop.unit]
                    blocks.hold(here)
                    bar.show(f"{here}, {as_size(checkpoint.bytes_read)} read")
                    bar.advance()
    if not metric.windows:
        raise UserError("batches must hold at least two tokens in a row, but there are none. Give a longer text.")
    return float(metric.compute())
