"""Run `evaluate`: measure models side by side."""

import gc
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from wanda_lightning.cli.measure import logged_results, measure
from wanda_lightning.cli.model_and_data import data_for, load
from wanda_lightning.cli.options import File, Measurements, Models, values_of
from wanda_lightning.cli.printing import print_line, print_table
from wanda_lightning.common.aliases import Kwargs
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.model_source import load_config, load_tokenizer
from wanda_lightning.data.images import ImageDataModule
from wanda_lightning.data.sentences import SentenceDataModule
from wanda_lightning.data.text import TextDataModule
from wanda_lightning.evaluation import Evaluation, Results, load_tasks, sparsity_of
from wanda_lightning.evaluation.agreement import Agreement
from wanda_lightning.evaluation.tasks import Answers, answer, flips
from wanda_lightning.lightning_modules.model_loading import check_source

_HEADINGS = {"val_accuracy": "top-1", "val_accuracy_top5": "top-5"}


@dataclass(frozen=True)
class _Prepared:
    """A model that will be measured, and its data; a classifier is already loaded, since it decides on transforms."""

    name: str
    is_dense: bool
    classifier: Any
    data: Any  # None: neither perplexity nor accuracy is measured


@dataclass
class _Dense:
    """Predictions and answers of the dense model; empty without `--dense`."""

    agreement: Agreement = field(default_factory=Agreement)
    answers: Answers = field(default_factory=dict)


def evaluate(models: Models, data: Measurements, results: File) -> None:
    """Measure models side by side, save the numbers and print them."""
    options = values_of(models, data, results)
    options = {name: value for name, value in options.items() if value is not None}
    evaluation = Evaluation(_measure_each(models, data), models.dense, options)
    table = evaluation.table()
    if results.save is None:
        print_table(table)
    else:
        evaluation.save(results.save)
        print_table(table)
        print_line(f"The numbers are in {results.save}.")


def _measure_each(models: Models, data: Measurements) -> dict[str, Results]:
    """Read the data of all models, to refuse them together; then load and measure one model at a time."""
    if models.is_language:
        for name in models.all:
            check_source(models.source(name))
        if models.dense and data.evaluation:
            _refuse_other_vocabularies(models)
    tasks = load_tasks(data.tasks, data.tasks_dir, models.cache_dir, data.num_fewshot)
    if tasks:
        _check_tokenizers(models, data)

    prepared = _prepare(models, data)
    dense = _Dense()
    measured = {}
    for title in list(prepared):
        measured[title] = _measure_one(models, data, tasks, prepared.pop(title), dense)
        # The module, its data and the Trainer refer to each other, so the model stays until it is collected.
        gc.collect()
    return measured


def _check_tokenizers(models: Models, data: Measurements) -> None:
    """Refuse models whose tokenizer is missing or lacks a chat template that was asked for."""
    for name in models.all:
        tokenizer = load_tokenizer(models.source(name))
        if tokenizer is None:
            raise UserError(
                f"--tasks need models with a tokenizer, but {name} has none. Save it beside the weights."
            )
        if data.apply_chat_template and not tokenizer.chat_template:
            raise UserError(
                f"--apply_chat_template needs a chat template, but the tokenizer of {name} has none. Leave the option "
                "out."
            )


def _refuse_other_vocabularies(models: Models) -> None:
    """Refuse a dense model with another vocabulary."""
    sizes = {}
    for name in models.all:  # the dense model first
        config = load_config(models.source(name)).get_text_config()
        sizes[name] = getattr(config, "vocab_size", None)
    dense, *others = models.all
    for name in others:
        if None not in (sizes[name], sizes[dense]) and sizes[name] != sizes[dense]:
            raise UserError(
                f"--dense must have the vocabulary of --model, since their predictions are compared, but {dense} has "
                f"{sizes[dense]:,} tokens and {name} has {sizes[name]:,}. Leave --dense out, or name the model that "
                "was pruned."
            )


def _prepare(models: Models, data: Measurements) -> dict[str, _Prepared]:
    """Read the data of each model, the dense one first; refuse language models that split the text differently."""
    sources = list(zip_longest(models.model, models.checkpoint))
    if models.dense:
        sources.insert(0, (models.dense, None))

    prepared = {}
    for name, checkpoint in sources:
        # One model may be given with several weights, which the name of the file distinguishes.
        title = " ".join(filter(None, (name, checkpoint)))
        classifier = None
        source = None
        if models.is_image:
            classifier = load(models, name, checkpoint)
        if models.is_image or data.evaluation:
            source = data_for(models, data, name, classifier)
        prepared[title] = _Prepared(name, title == models.dense, classifier, source)
        if isinstance(source, TextDataModule):
            _refuse_other_tokens(source, next(iter(prepared.values())).data, title)
    return prepared


def _refuse_other_tokens(texts: TextDataModule, first: Any, name: str) -> None:
    """Raise an error if the texts have other tokens than those of the first model."""
    for text in texts.evaluations:
        if not texts.windows_of(text).equal(first.windows_of(text)):
            raise UserError(
                "--model must name models with the same tokenizer, since perplexities over different tokens cannot "
                f"be compared, but {name} splits {text} differently than another. Evaluate them one by one."
            )


def _measure_one(
    models: Models, data: Measurements, tasks: Kwargs, prepared: _Prepared, dense: _Dense
) -> Results:
    """Load a language model; measure sparsity, perplexity or accuracy, and the tasks."""
    module = prepared.classifier or load(models, prepared.name)
    results = {"sparsity": sparsity_of(module.model)}
    if prepared.data is not None:
        metrics = measure(module, prepared.data, dense.agreement, prepared.is_dense)
        measured = _results(metrics, prepared.data)
        for number, values in enumerate(measured.values()):
            values |= dense.agreement.metrics(number)
        results |= measured
    if tasks:
        accuracies, answers = answer(
            module.model,
            module.tokenizer,
            tasks,
            data.batch_size or 4,
            data.task_limit,
            data.apply_chat_template,
        )
        for name, shares in flips(dense.answers, answers).items():
            accuracies[name] |= shares
        if prepared.is_dense:
            dense.answers = answers
        results |= accuracies
    return results


def _results(metrics: Mapping[str, float], data: Any) -> Results:
    """Return the metrics of each data set, with the number of windows, pairs or images."""

    def with_errors(headings: Mapping[str, str]) -> dict[str, float]:
        values = {}
        for name, heading in headings.items():
            for suffix in ("", "_stderr"):
                if name + suffix in metrics:
                    values[heading + suffix] = metrics[name + suffix]
        return values

    results = {}
    if isinstance(data, ImageDataModule):
        images: Any = data.val_dataloader().dataset
        results[data.data] = {**with_errors(_HEADINGS), "images": len(images)}
    elif isinstance(data, SentenceDataModule):
        pairs = len(data.evaluation_pairs)
        results[data.evaluation] = {"spearman": metrics["val_spearman"], "pairs": pairs}
    else:
        for text, name in zip(data.evaluations, logged_results(data), strict=True):
            windows = len(data.windows_of(text))
            results[text] = {**with_errors({name: "perplexity"}), "windows": windows}
    return results
