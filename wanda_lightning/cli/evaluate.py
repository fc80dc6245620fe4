"""`wanda-lightning evaluate`: perplexity, zero-shot accuracy, top-1 and top-5, of several models side by side."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from wanda_lightning.cli.measure import measure, measure_all, quiet_trainer
from wanda_lightning.cli.options import PAPER_SEQLEN, EvaluateOptions
from wanda_lightning.cli.parser import as_options
from wanda_lightning.cli.tables import print_table
from wanda_lightning.cli.windows import checked_seqlen, refuse_long_windows
from wanda_lightning.data import ImageDataModule, TextDataModule
from wanda_lightning.evaluation import Evaluation, Results, load_tasks, sparsity_of, task_names, zero_shot
from wanda_lightning.modules import CausalLMModule, ImageClassifierModule

_HEADINGS = {"val_accuracy": "top-1", "val_accuracy_top5": "top-5"}


def run(options: EvaluateOptions) -> None:
    """Measure models side by side, save the numbers and print them.

    Raises:
        ValueError: If the options do not fit together or a model; before anything is measured.
    """
    quiet_trainer()
    kind = _image_classifiers(options) if options.is_image else _language_models(options)
    evaluation = Evaluation(_measured(kind), options.dense, as_options(options))
    if options.save is not None:
        evaluation.save(options.save)
    print_table(evaluation.table())


def _language_models(options: EvaluateOptions) -> _LanguageModels:
    texts = ["wikitext2"] if options.eval is None else options.eval
    hub: dict[str, Any] = {"cache_dir": options.cache_dir, "trust_remote_code": options.trust_remote_code}
    for name in options.models:
        refuse_long_windows(options.seqlen, name, hub)
    tasks = load_tasks(task_names(options.tasks), options.tasks_dir, options.cache_dir)
    return _LanguageModels(options.models, options, hub, texts, tasks)


def _image_classifiers(options: EvaluateOptions) -> _ImageClassifiers:
    resumed: Sequence[str | None] = options.resume or [None] * len(options.model)
    sources: list[tuple[str, str | None]] = [(options.dense, None)] if options.dense else []
    sources += list(zip(options.model, resumed, strict=True))
    # One model with several weights: the file names tell them apart.
    checkpoints = {f"{name} {weights}" if weights else name: (name, weights) for name, weights in sources}
    return _ImageClassifiers(list(checkpoints), options, checkpoints)


@dataclass
class _LanguageModels:
    names: Sequence[str]
    options: EvaluateOptions
    hub: dict[str, Any]
    texts: Sequence[str]
    tasks: Mapping[str, Any]
    data: dict[str, list[TextDataModule]] = field(default_factory=dict)  # by model

    def load(self, name: str) -> CausalLMModule:
        return CausalLMModule(name, dtype=self.options.dtype or "auto", **self.hub)

    def prepare(self, name: str, module: CausalLMModule) -> None:
        if module.tokenizer is None:
            raise ValueError(f"{name} must have a tokenizer to read text, but it has none. Save one into its folder.")
        seqlen = checked_seqlen(self.options.seqlen, module.model.config, PAPER_SEQLEN)
        if other := next((one.seqlen for ready in self.data.values() for one in ready if one.seqlen != seqlen), None):
            raise ValueError(
                f"--seqlen must be given, since models are measured on the same windows, but {name} reads {seqlen} "
                f"tokens at once and another model {other}. Use --seqlen {min(seqlen, other)}."
            )
        limits: dict[str, Any] = {"seqlen": seqlen, "batch_size": self.batch_size, "limit": self.options.limit}
        self.data[name] = [
            TextDataModule(module.tokenizer, text, text, cache_dir=self.options.cache_dir, **limits)
            for text in self.texts
        ]
        for data in self.data[name]:
            data.setup("validate")
        first = next(iter(self.data.values()))
        for data, theirs in zip(self.data[name], first, strict=True):
            if not data.evaluation_windows.equal(theirs.evaluation_windows):
                raise ValueError(
                    "--model must name models with the same tokenizer, since perplexities of other tokens cannot be "
                    f"compared, but {name} splits {data.evaluation} differently than {self.names[0]}. Evaluate them "
                    "one by one, or give --eval '' to measure tasks alone."
                )

    @property
    def batch_size(self) -> int:
        return self.options.batch_size or 4

    def measure(self, name: str, module: CausalLMModule) -> Results:
        results: Results = {}
        for data in self.data.pop(name):  # else it would hold the Trainer, which holds the model
            perplexity = measure(module, data, "val_perplexity")
            results[data.evaluation] = {"perplexity": perplexity, "windows": len(data.evaluation_windows)}
        limit = self.options.task_limit
        return results | zero_shot(module.model, module.tokenizer, self.tasks, self.batch_size, limit)


@dataclass
class _ImageClassifiers:
    names: Sequence[str]
    options: EvaluateOptions
    checkpoints: Mapping[str, tuple[str, str | None]]

    def load(self, name: str) -> ImageClassifierModule:
        model, weights = self.checkpoints[name]
        return ImageClassifierModule(model, pretrained=weights is None, checkpoint=weights)

    def prepare(self, name: str, module: ImageClassifierModule) -> ImageDataModule:
        assert self.options.data_path is not None
        data = ImageDataModule(
            self.options.data_path,
            module,
            batch_size=self.options.batch_size or 64,
            cache_dir=self.options.cache_dir,
        )
        data.setup("validate")
        return data

    def measure(self, name: str, module: ImageClassifierModule) -> Results:
        data = self.prepare(name, module)
        numbers = measure_all(module, data)
        found = {heading: numbers[metric] for metric, heading in _HEADINGS.items() if metric in numbers}
        images = len(data.val_dataloader().dataset)  # type: ignore[arg-type]
        return {data.data: {**found, "images": images}}


def _measured(kind: Any) -> dict[str, Results]:
    """Measure one model at a time; all are loaded once before the first is measured, so that a bad one is refused."""
    module: Any = None
    for name in kind.names:
        module = None
        gc.collect()  # a module and the Trainer that ran it refer to each other
        module = kind.load(name)
        kind.prepare(name, module)
    results: dict[str, Results] = {}
    for name in kind.names:
        if len(kind.names) > 1:
            module = None
            gc.collect()
            module = kind.load(name)
        results[name] = {"sparsity": sparsity_of(module.model), **kind.measure(name, module)}
    return results
