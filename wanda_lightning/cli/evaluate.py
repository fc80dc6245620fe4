"""`wanda-lightning evaluate`: perplexity, zero-shot accuracy, top-1 and top-5, of several models side by side."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

from wanda_lightning.cli.common_options import PAPER_SEQLEN
from wanda_lightning.cli.measure import checked_seqlen, measure, refuse_long_windows
from wanda_lightning.cli.options import EvaluateOptions
from wanda_lightning.cli.output import print_table
from wanda_lightning.cli.parser import as_given
from wanda_lightning.common.errors import UserError
from wanda_lightning.data import ImageDataModule, TextDataModule
from wanda_lightning.evaluation import Evaluation, KeptZeros, Results, load_tasks, sparsity_of, task_names, zero_shot
from wanda_lightning.modules import CausalLMModule, ImageClassifierModule

_HEADINGS = {"val_accuracy": "top-1", "val_accuracy_top5": "top-5"}


def run(options: EvaluateOptions) -> None:
    """Measure models side by side, save the numbers and print them."""
    models = _ImageClassifiers(options) if options.is_image else _LanguageModels(options)
    evaluation = Evaluation(_measure_each(models, options.pruned), options.dense, as_given(options))
    if options.save is not None:
        evaluation.save(options.save)
    print_table(evaluation.table())


class _LanguageModels:
    """Language models, which are measured on the same windows of text and the same tasks."""

    def __init__(self, options: EvaluateOptions) -> None:
        self.names = options.models
        self._options = options
        for name in self.names:
            refuse_long_windows(options.seqlen, options.source(name))
        self._tasks = load_tasks(task_names(options.tasks), options.tasks_dir, options.cache_dir)
        self._batch_size = options.batch_size or 4
        self._texts: dict[str, list[TextDataModule]] = {}  # by model

    def load(self, name: str) -> CausalLMModule:
        return CausalLMModule(name, dtype=self._options.dtype or "auto", **self._options.source(name).hub)

    def prepare(self, name: str, module: CausalLMModule) -> None:
        """Tokenize the texts, and refuse models that would be measured on different windows."""
        names = ["wikitext2"] if self._options.evaluation is None else self._options.evaluation
        if module.tokenizer is None and (names or self._tasks):
            raise UserError(f"{name} must have a tokenizer to read text, but it has none. Save one into its folder.")
        options: dict[str, Any] = {
            "seqlen": checked_seqlen(self._options.seqlen, module.model.config, PAPER_SEQLEN),
            "batch_size": self._batch_size,
            "limit": self._options.limit,
            "cache_dir": self._options.cache_dir,
        }
        texts = [TextDataModule(module.tokenizer, text, text, **options) for text in names]
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
        limit = self._options.task_limit
        return results | zero_shot(module.model, module.tokenizer, self._tasks, self._batch_size, limit)


class _ImageClassifiers:
    """Image classifiers, each with its pretrained weights or with those of a file."""

    def __init__(self, options: EvaluateOptions) -> None:
        self._options = options
        sources: list[tuple[str, str | None]] = [(name, None) for name in (options.dense, options.pruned) if name]
        weights: Sequence[str | None] = options.checkpoint or [None] * len(options.model)
        sources += zip(options.model, weights, strict=True)
        # One model with several weights: the file names distinguish them.
        self._sources = {f"{name} {file}" if file else name: (name, file) for name, file in sources}
        self.names = list(self._sources)

    def load(self, name: str) -> ImageClassifierModule:
        model, weights = self._sources[name]
        return ImageClassifierModule(model, pretrained=weights is None, checkpoint=weights)

    def prepare(self, name: str, module: ImageClassifierModule) -> ImageDataModule:
        assert self._options.data is not None
        size = self._options.batch_size or 64
        data = ImageDataModule(self._options.data, module, batch_size=size, cache_dir=self._options.cache_dir)
        data.setup("validate")
        return data

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
