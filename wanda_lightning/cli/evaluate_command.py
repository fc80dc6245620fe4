"""`wanda-lightning evaluate`: perplexity, zero-shot accuracy, top-1 and top-5, of several models side by side."""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from wanda_lightning.checks import check_positive
from wanda_lightning.cli.measure import measure, measure_all
from wanda_lightning.cli.options import TIMM, as_patterns, checked_seqlen, refuse_given
from wanda_lightning.data import ImageDataModule, TextDataModule
from wanda_lightning.data.text_sources import check_source
from wanda_lightning.evaluation import Evaluation, Results, load_tasks, sparsity_of, task_names, zero_shot
from wanda_lightning.files import refuse_existing
from wanda_lightning.modules import CausalLMModule, ImageClassifierModule

_PAPER_SEQLEN = 2048
_HEADINGS = {"val_accuracy": "top-1", "val_accuracy_top5": "top-5"}


def evaluate_models(
    model: str | list[str],
    dense: str | None = None,
    eval: str | list[str] | None = None,
    tasks: str | list[str] | None = None,
    tasks_dir: str | None = None,
    data_path: str | None = None,
    limit: int | None = None,
    task_limit: int | None = None,
    seqlen: int | None = None,
    batch_size: int | None = None,
    dtype: str | None = None,
    save: str | None = None,
    cache_dir: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Measure models side by side: perplexity and zero-shot tasks, or accuracy on images; and their sparsity.

    Args:
        model: Hub ids, folders or .gguf files of language models; or timm:NAME of image classifiers, a folder as
            timm:local-dir:FOLDER. Several are separated by commas, or a list.
        dense: One more, the first: the table shows the differences of the others to it.
        eval: Texts to measure perplexity on, several as with model: c4, wikitext2 (as in the paper, the default),
            python-docs (needs no network) or a FILE (.txt, .jsonl, .parquet); an empty string for none.
        tasks: Zero-shot tasks, likewise, by default none: boolq, rte, hellaswag, winogrande, arc_easy, arc_challenge,
            openbookqa; or paper for all of them (needs lm-eval).
        tasks_dir: Folder with a TASK.jsonl for each task, with the fields of the data set on the hub, whose documents
            it replaces.
        data_path: Images to measure on: a folder in the manner of ImageNet, cifar10, cifar100, a hub id, or digits
            (needs no network, the default).
        limit: Windows of each text; by default all.
        task_limit: Documents of each task; by default all.
        seqlen: Tokens in a window; by default the model's context, 2048 at the most.
        batch_size: Windows or choices in a batch, by default 4; or images, by default 64.
        dtype: auto (as stored, the default), float32, bfloat16 or float16.
        save: JSON file for all numbers.
        cache_dir: Where downloads from the hub are kept.
        overwrite: Replace a --save file.
        trust_remote_code: Run the code that comes with a hub model.

    Raises:
        ValueError: If the options do not fit together or a model; before anything is measured.
    """
    options = {name: value for name, value in locals().items() if value is not None}
    if save is not None:
        refuse_existing(save, overwrite)
    check_positive(limit=limit, task_limit=task_limit, seqlen=seqlen, batch_size=batch_size)
    names = list(dict.fromkeys([*([dense] if dense else []), *as_patterns(model)]))
    are_images = {name.startswith(TIMM) for name in names}
    if len(are_images) != 1:
        found = "both were given" if names else "none was given"
        raise ValueError(f"--model names language models or image classifiers to put side by side, but {found}")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    kind: _LanguageModels | _ImageClassifiers
    if are_images == {True}:
        refuse_given(
            "an image classifier",
            eval=eval,
            tasks=tasks,
            tasks_dir=tasks_dir,
            limit=limit,
            task_limit=task_limit,
            seqlen=seqlen,
            dtype=dtype,
            trust_remote_code=trust_remote_code or None,
        )
        kind = _ImageClassifiers(data_path or "digits", batch_size or 64, cache_dir)
    else:
        refuse_given("a language model", data_path=data_path)
        if not tasks:
            refuse_given("an evaluation without --tasks", tasks_dir=tasks_dir, task_limit=task_limit)
        texts = ["wikitext2"] if eval is None else as_patterns(eval)
        for text in texts:
            check_source(text)
        kind = _LanguageModels(
            {"dtype": dtype or "auto", "cache_dir": cache_dir, "trust_remote_code": trust_remote_code},
            texts,
            load_tasks(task_names(as_patterns(tasks or "")), tasks_dir, cache_dir),
            seqlen,
            batch_size or 4,
            limit,
            task_limit,
        )
    evaluation = Evaluation(_measured(names, kind), dense, options)
    if save is not None:
        evaluation.save(save)
    Console().print(evaluation.table())


@dataclass
class _LanguageModels:
    hub: dict[str, Any]
    texts: Sequence[str]
    tasks: Mapping[str, Any]
    seqlen: int | None
    batch_size: int
    limit: int | None
    task_limit: int | None
    data: dict[str, list[TextDataModule]] = field(default_factory=dict)  # by model

    def load(self, name: str) -> CausalLMModule:
        return CausalLMModule(name, **self.hub)

    def prepare(self, name: str, module: CausalLMModule) -> None:
        if module.tokenizer is None:
            raise ValueError(f"{name} has no tokenizer, without which it reads no text: save one into its folder")
        seqlen = checked_seqlen(self.seqlen, module, _PAPER_SEQLEN)
        if other := next((one.seqlen for ready in self.data.values() for one in ready if one.seqlen != seqlen), None):
            raise ValueError(
                f"Models are measured on the same windows, but {name} reads {seqlen} tokens at once and another model "
                f"{other}: give --seqlen {min(seqlen, other)}"
            )
        windows: dict[str, Any] = {"seqlen": seqlen, "batch_size": self.batch_size, "limit": self.limit}
        self.data[name] = [
            TextDataModule(module.tokenizer, text, text, cache_dir=self.hub["cache_dir"], **windows)
            for text in self.texts
        ]
        for data in self.data[name]:
            data.setup("validate")

    def measure(self, name: str, module: CausalLMModule) -> Results:
        results: Results = {}
        for data in self.data.pop(name):  # else it would hold the Trainer, which holds the model
            perplexity = measure(module, data, "val_perplexity")
            results[data.evaluation] = {"perplexity": perplexity, "windows": len(data.evaluation_windows)}
        return results | zero_shot(module.model, module.tokenizer, self.tasks, self.batch_size, self.task_limit)


@dataclass
class _ImageClassifiers:
    data_path: str
    batch_size: int
    cache_dir: str | None

    def load(self, name: str) -> ImageClassifierModule:
        return ImageClassifierModule(name)

    def prepare(self, name: str, module: ImageClassifierModule) -> ImageDataModule:
        data = ImageDataModule(self.data_path, module, batch_size=self.batch_size, cache_dir=self.cache_dir)
        data.setup("validate")
        return data

    def measure(self, name: str, module: ImageClassifierModule) -> Results:
        data = self.prepare(name, module)
        numbers = measure_all(module, data)
        found = {heading: numbers[metric] for metric, heading in _HEADINGS.items() if metric in numbers}
        images = len(data.val_dataloader().dataset)  # type: ignore[arg-type]
        return {self.data_path: {**found, "images": images}}


def _measured(names: Sequence[str], kind: Any) -> dict[str, Results]:
    """One model in memory at a time; all are loaded once before the first is measured, so that a bad one is refused."""
    module: Any = None
    for name in names:
        module = None
        gc.collect()  # a module and the Trainer that ran it refer to each other
        module = kind.load(name)
        kind.prepare(name, module)
    results: dict[str, Results] = {}
    for name in names:
        if len(names) > 1:
            module = None
            gc.collect()
            module = kind.load(name)
        results[name] = {"sparsity": sparsity_of(module.model), **kind.measure(name, module)}
    return results
