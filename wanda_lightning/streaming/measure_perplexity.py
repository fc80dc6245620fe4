"""Measure the perplexity of a model that does not fit in memory."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import islice
from math import ceil
from typing import Any

import torch

from wanda_lightning.calibration.batches import to_device
from wanda_lightning.calibration.lockstep import lockstep
from wanda_lightning.calibration.pruning_mode import pruning_mode
from wanda_lightning.calibration.samples import Sample, length_of
from wanda_lightning.common.aliases import StrPath
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.model_source import ModelSource
from wanda_lightning.common.progress import ProgressBar
from wanda_lightning.evaluation.perplexity import WindowPerplexity
from wanda_lightning.lightning_modules.model_loading import check_causal
from wanda_lightning.models import Stop, check_tokens
from wanda_lightning.streaming.checkpoint import BlockLoader, Checkpoint

AT_ONCE = 32  # batches that pass through the model together


def perplexity_from_disk(
    source: StrPath,
    batches: Iterable[Mapping[str, Any]],
    *,
    dtype: str | torch.dtype = "auto",
    progress: bool = True,
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
        dtype: `"auto"` as stored, or float32, bfloat16 or float16, as a name or a `torch.dtype`.
        progress: Show a bar.
        device: Where the model computes.
        revision: Revision of a hub model.
        cache_dir: Folder for downloads from the hub.
        trust_remote_code: Run the code that comes with a hub model.

    Raises:
        ValueError: If no token of the batches has a next token.
    """
    place = ModelSource(source, revision or "main", cache_dir, trust_remote_code)
    metric = measured_from_disk(Checkpoint(place, dtype, device), batches, progress)
    return float(metric.compute())


def measured_from_disk(
    checkpoint: Checkpoint,
    batches: Iterable[Mapping[str, Any]],
    progress: bool = True,
    after_batch: Callable[[Mapping[str, Any], int], object] = lambda batch, index: None,
) -> WindowPerplexity:
    """Return the metric after all batches; `after_batch` gets each with its index as soon as the model has run it."""
    check_causal(checkpoint.model)
    metric = WindowPerplexity().to(checkpoint.device)

    def run(batch: Mapping[str, Any], index: int) -> None:
        check_tokens(checkpoint.model, batch["input_ids"])
        batch = to_device(batch, checkpoint.device)
        input_ids = batch["input_ids"]
        mask = batch.get("attention_mask")
        output = checkpoint.model(input_ids, attention_mask=mask, use_cache=False)
        metric.update(output.logits, input_ids, mask)
        after_batch(batch, index)

    blocks = [Stop(block, checkpoint.model.get_submodule(block), ()) for block in checkpoint.blocks]
    number = length_of(batches)
    total = None if number is None else ceil(number / AT_ONCE) * len(blocks)
    numbered = enumerate(batches)
    with pruning_mode(checkpoint.model), ProgressBar("Measuring", total, progress) as bar:
        while group := list(islice(numbered, AT_ONCE)):
            samples = []
            for index, batch in group:
                run_batch = partial(run, batch, index)
                samples.append(Sample(run_batch, run_batch, batch_index=index))
            loader = BlockLoader(checkpoint)
            with loader.loading(), loader.visiting(blocks):
                for block, _ in lockstep(blocks, samples, to_end=True, model=checkpoint.model):
                    loader.load_only(block.name)
                    bar.show(block.name)
                    bar.advance()
    if not metric.windows:
        raise UserError(
            "batches must hold at least two tokens in a row, but there are none. Give a longer text."
        )
    return metric
