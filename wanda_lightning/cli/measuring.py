"""Load and measure models; what `evaluate` runs: several models side by side."""

from __future__ import annotations

import gc
import logging
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, RichProgressBar

from wanda_lightning.cli.options import File, Measurements, Model, Models
from wanda_lightning.cli.output import print_line, print_table
from wanda_lightning.cli.parsing import UsageError, values_of
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.model_source import ModelSource, load_config
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
    plain = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    bar = RichProgressBar(console_kwargs={"stderr": True})  # a closed stdout must not end the work
    trainer = L.Trainer(accelerator="auto", devices=1, callbacks=[bar, *callbacks], **plain)  # type: ignore[arg-type]
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
        raise UsageError(f"--seqlen must be at most {context}, the model's context, but it is {seqlen}.")
    return min(_PAPER_SEQLEN, context) if seqlen is None else seqlen


def evaluate(models: Models, data: Measurements, results: File) -> None:
    """Measure models side by side, save the numbers and print them."""
    kind = _ImageClassifiers(models, data) if models.is_image else _LanguageModels(models, data)
    given = {name: value for name, value in values_of(models, data, results).items() if value is not None}
    evaluation = Evaluation(_measure_each(kind, models.pruned), models.dense, given)
    if results.save is not None:
        evaluation.save(results.save)
    print_table(evaluation.table())
    if results.save is not None:
        print_line(f"The numbers are in {results.save}.")


class _LanguageModels:
    """Language models, which are measured on the same windows of text and the same tasks."""

    def __init__(self, models: Models, data: Measurements) -> None:
        self.names = models.all
        self._models, self._data = models, data
        for name in self.names:
            refuse_long_windows(data.seqlen, models.source(name))
        self._tasks = load_tasks(task_names(data.tasks), data.tasks_dir, models.cache_dir)
        self._batch_size = data.batch_size or 4
        self._texts: dict[str, list[TextDataModule]] = {}  # by model

    def load(self, name: str) -> Any:
        return load(self._models, name)

    def prepare(self, name: str, module: CausalLMModule) -> None:
        """Tokenize the texts, and refuse models that would be measured on different windows."""
        if module.tokenizer is None and (self._data.evaluation or self._tasks):
            raise UserError(f"{name} must have a tokenizer to read text, but it has none. Save one into its folder.")
        options: dict[str, Any] = {
            "seqlen": checked_seqlen(self._data.seqlen, module.model.config),
            "batch_size": self._batch_size,
            "limit": self._data.limit,
            "cache_dir": self._models.cache_dir,
        }
        texts = [TextDataModule(module.tokenizer, text, text, **options) for text in self._data.evaluation]
        for text in texts:
            text.setup("validate")
        for text, first in zip(texts, next(iter(self._texts.values()), texts), strict=True):
            if text.seqlen != first.seqlen:
                raise UserError(
                    f"--seqlen must be given, since models are measured on the same windows, but {name} reads "
                    f"{text.seqlen} tokens at once and another model {first.seqlen}. Use --seqlen "
                    f"{min(text.seqlen, first.seqlen)}."
                )
            if not text.evaluation_windows.equal(first.evaluation_windows):
                raise UserError(
                    "--model must name models with the same tokenizer, since perplexities over different tokens cannot "
                    f"be compared, but {name} splits {text.evaluation} differently than {self.names[0]}. Evaluate them "
                    "one by one, or give --evaluation '' to measure tasks alone."
                )
        self._texts[name] = texts

    def measure(self, name: str, module: CausalLMModule) -> Results:
        results: Results = {}
        for text in self._texts.pop(name):  # pop, or the text would hold its Trainer, which holds the model
            perplexity = measure(module, text)["val_perplexity"]
            results[text.evaluation] = {"perplexity": perplexity, "windows": len(text.evaluation_windows)}
        return results | zero_shot(module.model, module.tokenizer, self._tasks, self._batch_size, self._data.task_limit)


class _ImageClassifiers:
    """Image classifiers, each with its pretrained weights or with those of a file."""

    def __init__(self, models: Models, data: Measurements) -> None:
        self._models, self._data = models, data
        sources: list[tuple[str, str | None]] = [(name, None) for name in (models.dense, models.pruned) if name]
        sources += zip(models.model, models.checkpoint or [None] * len(models.model), strict=True)
        # One model with several weights: the file names distinguish them.
        self._sources = {f"{name} {file}" if file else name: (name, file) for name, file in sources}
        self.names = list(self._sources)

    def load(self, name: str) -> Any:
        return load(self._models, *self._sources[name])

    def prepare(self, name: str, module: ImageClassifierModule) -> ImageDataModule:
        size, data = self._data.batch_size or 64, self._data.data or ""
        images = ImageDataModule(data, module, batch_size=size, cache_dir=self._models.cache_dir)
        images.setup("validate")
        return images

    def measure(self, name: str, module: ImageClassifierModule) -> Results:
        data = self.prepare(name, module)
        numbers = measure(module, data)
        found = {heading: numbers[metric] for metric, heading in _HEADINGS.items() if metric in numbers}
        images = len(data.val_dataloader().dataset)  # type: ignore[arg-type]
        return {data.data: {**found, "images": images}}


def _measure_each(models: Any, pruned: str | None) -> dict[str, Results]:
    """Load all models once, so that none is refused after another was measured; then measure them one at a time."""
    module: Any = None
    zeros: KeptZeros | None = None
    lost: dict[str, dict[str, float]] = {name: {} for name in models.names}
    for name in models.names:
        module = None
        gc.collect()  # a module and the Trainer that ran it refer to each other
        module = models.load(name)
        models.prepare(name, module)
        if name == pruned:
            zeros = KeptZeros(module.model, name)
        elif zeros is not None:
            lost[name] = {"lost": zeros.lost(module.model, name)}
    results: dict[str, Results] = {}
    for name in models.names:
        if len(models.names) > 1:
            module = None
            gc.collect()
            module = models.load(name)
        results[name] = {"sparsity": sparsity_of(module.model) | lost[name], **models.measure(name, module)}
    return results
