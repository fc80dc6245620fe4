"""Load and measure models; what `evaluate` runs: several models side by side."""

from __future__ import annotations

import gc
import logging
from contextlib import ExitStack
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, LambdaCallback

from wanda_lightning.cli.options import File, Measurements, Model, Models
from wanda_lightning.cli.output import print_line, print_table
from wanda_lightning.cli.parsing import values_of
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.model_source import ModelSource, load_config
from wanda_lightning.common.progress import ProgressBar
from wanda_lightning.data import ImageDataModule, TextDataModule
from wanda_lightning.evaluation import Evaluation, KeptZeros, Results, load_tasks, sparsity_of, task_names, zero_shot
from wanda_lightning.modules import CausalLMModule, ImageClassifierModule

_PAPER_SEQLEN = 2048
_HEADINGS = {"val_accuracy": "top-1", "val_accuracy_top5": "top-5"}


def load(options: Model | Models, name: str, checkpoint: str | None = None) -> Any:
    """Return the module of a model, an image classifier with its pretrained weights or those of a checkpoint."""
    if options.is_image:
        return ImageClassifierModule(name, pretrained=checkpoint is None, checkpoint=checkpoint)
    return CausalLMModule(name, dtype=options.dtype, **options.source(name).hub)


def measure(module: L.LightningModule, data: L.LightningDataModule, *callbacks: Callback) -> dict[str, float]:
    """Run one validation loop, and return its metrics."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # not about the hardware
    plain = dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar"), False)
    with ExitStack() as shown:
        bar = shown.enter_context(ProgressBar("Measuring", None))
        progress = LambdaCallback(
            on_validation_start=lambda trainer, _: bar.expect(sum(trainer.num_val_batches)),
            on_validation_batch_end=lambda *_: bar.advance(),
            on_validation_end=lambda *_: shown.close(),
        )
        trainer = L.Trainer(accelerator="auto", devices=1, callbacks=[progress, *callbacks], **plain)  # type: ignore[arg-type]
        trainer.validate(module, data, verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def refuse_long_windows(seqlen: int | None, model: ModelSource) -> None:
    """Refuse windows that are longer than the context of a model, before its weights are loaded."""
    if seqlen is not None:
        checked_seqlen(seqlen, load_config(model))


def checked_seqlen(seqlen: int | None, config: Any) -> int:
    """Return the number of tokens in a window: the given one if it fits, else the context, but at most 2048."""
    context = int(getattr(config.get_text_config(), "max_position_embeddings", 0) or seqlen or _PAPER_SEQLEN)
    if seqlen is not None and seqlen > context:
        raise UserError(f"--seqlen must be at most {context}, the model's context, but it is {seqlen}.")
    return min(_PAPER_SEQLEN, context) if seqlen is None else seqlen


def evaluate(models: Models, data: Measurements, results: File) -> None:
    """Measure models side by side, save the numbers and print them."""
    given = {name: value for name, value in values_of(models, data, results).items() if value is not None}
    evaluation = Evaluation(_measure_each(models, data), models.dense, given)
    if results.save is not None:
        evaluation.save(results.save)
    print_table(evaluation.table())
    if results.save is not None:
        print_line(f"The numbers are in {results.save}.")


def _measure_each(models: Models, data: Measurements) -> dict[str, Results]:
    """Load all models once, so that none is refused after another was measured; then measure them one at a time."""
    for name in () if models.is_image else models.all:
        refuse_long_windows(data.seqlen, models.source(name))
    tasks = load_tasks(task_names(data.tasks), data.tasks_dir, models.cache_dir)
    sources: list[tuple[str, str | None]] = [(name, None) for name in (models.dense, models.pruned) if name]
    sources += zip(models.model, models.checkpoint or [None] * len(models.model), strict=True)
    # One model with several weights: the file names distinguish them.
    named = {f"{name} {file}" if file else name: (name, file) for name, file in sources}
    zeros, lost, first, prepared = None, dict[str, dict[str, float]](), list[TextDataModule](), list[Any]()
    module: Any = None
    for name, source in named.items():
        module, prepared = None, []
        gc.collect()  # a module and the Trainer that ran it refer to each other
        module = load(models, *source)
        prepared = _prepare(models, data, name, module, bool(tasks))
        first = first or ([] if models.is_image else prepared)
        for text, other in zip(prepared, first, strict=True) if first else ():
            _refuse_other_windows(name, text, other)
        if name == models.pruned:
            zeros = KeptZeros(module.model, name)
        elif zeros is not None:
            lost[name] = {"lost": zeros.lost(module.model, name)}
    first, results = [], dict[str, Results]()
    for name, source in named.items():
        if len(named) > 1:
            module, prepared = None, []
            gc.collect()
            module = load(models, *source)
            prepared = _prepare(models, data, name, module, bool(tasks))
        results[name] = {"sparsity": sparsity_of(module.model) | lost.get(name, {}), **_measured(module, prepared)}
        if tasks:
            results[name] |= zero_shot(module.model, module.tokenizer, tasks, data.batch_size or 4, data.task_limit)
    return results


def _prepare(models: Models, data: Measurements, name: str, module: Any, reads: bool) -> list[Any]:
    """Return the images, or each text in windows; they do not hold the module."""
    if models.is_image:
        size = data.batch_size or 64
        images = ImageDataModule(data.data or "", module, batch_size=size, cache_dir=models.cache_dir)
        images.setup("validate")
        return [images]
    if module.tokenizer is None and (data.evaluation or reads):
        raise UserError(f"{name} must have a tokenizer to read text, but it has none. Save one into its folder.")
    seqlen, size = checked_seqlen(data.seqlen, module.model.config), data.batch_size or 4
    options: dict[str, Any] = {"seqlen": seqlen, "batch_size": size, "limit": data.limit, "cache_dir": models.cache_dir}
    texts = [TextDataModule(module.tokenizer, text, text, **options) for text in data.evaluation]
    for text in texts:
        text.setup("validate")
    return texts


def _refuse_other_windows(name: str, text: TextDataModule, other: TextDataModule) -> None:
    if text.seqlen != other.seqlen:
        raise UserError(
            f"--seqlen must be given, since models are measured on the same windows, but {name} reads {text.seqlen} "
            f"tokens at once and another model {other.seqlen}. Use --seqlen {min(text.seqlen, other.seqlen)}."
        )
    if not text.evaluation_windows.equal(other.evaluation_windows):
        raise UserError(
            "--model must name models with the same tokenizer, since perplexities over different tokens cannot be "
            f"compared, but {name} splits {text.evaluation} differently than another. Evaluate them one by one, or "
            "give --evaluation '' to measure tasks alone."
        )


def _measured(module: Any, data: list[Any]) -> Results:
    results: Results = {}
    for each in data:
        numbers = measure(module, each)
        if isinstance(each, TextDataModule):
            windows = len(each.evaluation_windows)
            results[each.evaluation] = {"perplexity": numbers["val_perplexity"], "windows": windows}
        else:
            found = {heading: numbers[metric] for metric, heading in _HEADINGS.items() if metric in numbers}
            results[each.data] = {**found, "images": len(each.val_dataloader().dataset)}
    return results
