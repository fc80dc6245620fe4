"""Load, measure and show models: what `evaluate` and `inspect` run."""

from __future__ import annotations

import gc
import logging
from itertools import groupby, pairwise
from time import perf_counter
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import LambdaCallback
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from wanda_lightning.cli.options import Data, File, Measurements, Model, Models, values_of
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.model_source import load_config, load_tokenizer
from wanda_lightning.common.progress import ProgressBar
from wanda_lightning.common.wording import as_size, quantity
from wanda_lightning.config import PruningConfig
from wanda_lightning.data.images import ImageDataModule
from wanda_lightning.data.text import TextDataModule
from wanda_lightning.engine.make_report import low_coverage, unfit_layers
from wanda_lightning.evaluation import Evaluation, Results, load_tasks, sparsity_of, zero_shot
from wanda_lightning.experts.removal import find_mixtures
from wanda_lightning.models import Inventory, Stop, find_layers
from wanda_lightning.modules import CausalLMModule, ImageClassifierModule
from wanda_lightning.modules.model_loading import check_source, model_from_config
from wanda_lightning.planning.plan import config_for, refuse_nothing_to_prune
from wanda_lightning.report import skipped_table
from wanda_lightning.report.descriptions import PERPLEXITY, TOP1

_PAPER_SEQLEN = 2048
_HEADINGS = {"val_accuracy": "top-1", "val_accuracy_top5": "top-5"}

AnyData = TextDataModule | ImageDataModule


def load(options: Model | Models, name: str, checkpoint: str | None = None) -> Any:
    """Return the module of a model, an image classifier with its pretrained weights or those of a checkpoint."""
    if options.is_image:
        return ImageClassifierModule(name, pretrained=checkpoint is None, checkpoint=checkpoint)
    return CausalLMModule(name, dtype=options.dtype, **options.source(name).hub)


def data_for(
    options: Model | Models, data: Data | Measurements, name: str, classifier: Any = None
) -> AnyData:
    """Return the images for a classifier, or the texts for a model of this name, in windows that fit all models."""
    num_samples = getattr(data, "num_samples", None)
    seed = getattr(data, "seed", 0)
    if options.is_image:
        images = ImageDataModule(
            data.data or "", classifier, data.batch_size or 64, num_samples or 4096, seed=seed
        )
        images.setup()
        return images
    return TextDataModule(
        load_tokenizer(options.source(name)),
        getattr(data, "calibration", "python-docs"),
        data.evaluation or "python-docs",  # which is not read
        window_length(options, data.seqlen),
        num_samples or 128,
        data.batch_size or 4,
        data.limit,
        seed,
        options.cache_dir,
    )


def window_length(options: Model | Models, asked: int | None) -> int:
    """Return the number of tokens in a window: `asked` if it fits all models, else what fits them, at most 2048."""
    configs = [load_config(options.source(name)).get_text_config() for name in options.all]
    context = min(
        getattr(config, "max_position_embeddings", 0) or asked or _PAPER_SEQLEN
        for config in configs
    )
    if asked is not None and asked > context:
        raise UserError(
            f"--seqlen must be at most {context}, the model's context, but it is {asked}."
        )
    return min(_PAPER_SEQLEN, context) if asked is None else asked


def measure(module: L.LightningModule, data: AnyData) -> dict[str, float]:
    """Run one validation loop, and return its metrics.

    `speed` is among them if there are two batches or more: the tokens or images per second of the fastest batch, which
    other work of the machine has disturbed least.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # not about the hardware
    plain = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar"), False
    )
    starts: list[
        tuple[float, int]
    ] = []  # of each batch: when, and how many tokens or images it has

    def start(_: L.Trainer, __: L.LightningModule, batch: Any, *___: Any) -> None:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()  # the CPU only queues what an accelerator computes
        starts.append(
            (
                perf_counter(),
                batch["input_ids"].numel() if isinstance(batch, dict) else len(batch[0]),
            )
        )

    with ProgressBar("Measuring", None) as bar:
        callback = LambdaCallback(
            on_validation_start=lambda trainer, _: bar.expect(sum(trainer.num_val_batches)),
            on_validation_batch_start=start,
            on_validation_batch_end=lambda *_: bar.advance(),
        )
        trainer = L.Trainer(accelerator="auto", devices=1, callbacks=[callback], **plain)  # type: ignore[arg-type]
        trainer.validate(module, data, verbose=False)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    if len(starts) > 1:
        metrics["speed"] = max(size / (end - begin) for (begin, size), (end, _) in pairwise(starts))
    return metrics


def logged_names(data: AnyData) -> list[str]:
    """Return the names under which a Trainer logs the result on each data set."""
    if isinstance(data, ImageDataModule):
        return [TOP1.logged[0]]
    first = PERPLEXITY.logged[0]
    return [first, *(f"{first}/{text}" for text in data.evaluations[1:])]


def evaluate(models: Models, data: Measurements, results: File) -> None:
    """Measure models side by side, save the numbers and print them."""
    given = {
        name: value for name, value in values_of(models, data, results).items() if value is not None
    }
    evaluation = Evaluation(_measure_each(models, data), models.dense, given)
    if results.save is not None:
        evaluation.save(results.save)
    print_table(evaluation.table())
    if results.save is not None:
        print_line(f"The numbers are in {results.save}.")


def _measure_each(models: Models, data: Measurements) -> dict[str, Results]:
    """Read the data of all models, to refuse them together; then load and measure one model at a time."""
    for name in () if models.is_image else models.all:
        check_source(models.source(name))
    tasks = load_tasks(data.tasks, data.tasks_dir, models.cache_dir)
    sources: list[tuple[str, str | None]] = [(models.dense, None)] if models.dense else []
    sources += zip(models.model, models.checkpoint or [None] * len(models.model), strict=True)
    # One model with several weights: the file names distinguish them.
    named = {f"{name} {file}" if file else name: (name, file) for name, file in sources}
    if tasks and not all(load_tokenizer(models.source(name)) for name in models.all):
        raise UserError("--tasks need models with a tokenizer. Save it beside the weights.")
    classifiers = {name: load(models, *source) for name, source in named.items() if models.is_image}
    prepared: dict[str, Any] = {}
    for name, source in named.items() if models.is_image or data.evaluation else ():
        prepared[name] = data_for(models, data, source[0], classifiers.get(name))
        for text in () if models.is_image else prepared[name].evaluations:
            if (
                not prepared[name]
                .windows_of(text)
                .equal(next(iter(prepared.values())).windows_of(text))
            ):
                raise UserError(
                    "--model must name models with the same tokenizer, since perplexities over different tokens cannot "
                    f"be compared, but {name} splits {text} differently than another. Evaluate them one by one."
                )
    measured: dict[str, Results] = {}
    module: Any = None
    for name, source in named.items():
        module = None
        gc.collect()  # a module and the Trainer that ran it refer to each other
        module = classifiers.get(name) or load(models, *source)
        measured[name] = {"sparsity": sparsity_of(module.model)}
        if name in prepared:
            measured[name] |= _results(module, prepared.pop(name))
        if tasks:
            measured[name] |= zero_shot(
                module.model, module.tokenizer, tasks, data.batch_size or 4, data.task_limit
            )
    return measured


def _results(module: Any, data: AnyData) -> Results:
    numbers = measure(module, data)
    if isinstance(data, ImageDataModule):
        found = {
            heading: numbers[metric] for metric, heading in _HEADINGS.items() if metric in numbers
        }
        return {data.data: {**found, "images": len(data.val_dataloader().dataset)}}  # type: ignore[arg-type]
    names = zip(data.evaluations, logged_names(data), strict=True)
    return {
        text: {"perplexity": numbers[name], "windows": len(data.windows_of(text))}
        for text, name in names
    }


def inspect(config: PruningConfig, options: Model) -> None:
    """Print the layers that would be pruned, by stop, and the other matrices, by reason."""
    source = options.source(options.model)
    if not options.is_image:
        check_source(source, weights=False)
    model: Any = model_from_config(source)
    config = config_for(config, model)
    found = find_layers(model, config.sequential, config.skip, config.only, config.pattern)
    print_table(_stops_table(found, options.model))
    print_table(skipped_table(found.skipped))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    weights = sum(layer.size for layer in found.layers)
    print_line(
        f"{quantity(len(found.layers), 'layer')} at {quantity(len(found.stops), 'stop')} hold {weights:,} weights, "
        f"{weights / parameters:.1%} of the model's {parameters:,} parameters, with --sequential {config.sequential}."
    )
    for note in filter(None, (unfit_layers(found), low_coverage(found))):
        print_line(f"Note: {note.text}")
    if config.pattern.prunes_units:
        print_line(
            "Note: --pattern structured prunes only those of these layers that write or read hidden units."
        )
    refuse_nothing_to_prune(config, found)
    if config.pattern.drops_experts:
        find_mixtures(config, model, found)
    if not options.is_image:
        print_line(_memory(model, found, options))


def _memory(model: Any, found: Inventory, options: Model) -> str:
    """Describe the memory that grows with the model and with the samples when a model is pruned from disk."""
    dtype = (
        getattr(torch, options.dtype)
        if options.dtype != "auto"
        else model.config.dtype or model.dtype
    )
    blocks = (model.get_submodule(name).parameters() for name in {*found.blocks.values()} if name)
    largest = dtype.itemsize * max(
        (sum(each.numel() for each in block) for block in blocks), default=0
    )
    seqlen = window_length(options, None)
    width = model.get_input_embeddings().weight.shape[-1]
    windows = 128
    return (
        f"prune --stream holds {as_size(2 * largest + dtype.itemsize * windows * seqlen * width)} for a while: twice "
        f"the largest block ({as_size(largest)}), and the inputs of a block for {windows} windows of {seqlen} tokens."
    )


def _stops_table(found: Inventory, model: str) -> Table:
    table = Table(title=f"{escape(model)}: would be pruned", title_justify="left")
    for heading in ("stop", "layers", "weights", "inside"):
        table.add_column(
            heading,
            justify="right" if heading in ("layers", "weights") else "left",
            overflow="fold",
        )
    for alike, group in groupby(found.stops, _row):  # most blocks of a model are alike
        first, *others = group
        names = escape(first.name) or "the whole model"
        if others:
            names += f" to {escape(others[-1].name)}, each of {len(others) + 1}"
        table.add_row(names, *alike)
    return table


def _row(stop: Stop) -> tuple[str, str, str]:
    """Return the number of layers and weights of a stop, and the layers inside, with one name for all experts."""
    inside = [(layer.siblings or layer.name).removeprefix(f"{stop.name}.") for layer in stop.layers]
    names = ", ".join(dict.fromkeys(inside)) if stop.name and inside != [stop.name] else ""
    return str(len(stop.layers)), f"{sum(layer.size for layer in stop.layers):,}", escape(names)


def print_table(table: Table) -> None:
    """Print a table, as wide as it is where the output is not a terminal."""
    console = Console(emoji=False)  # `N:M:` would contain one
    if not console.is_terminal:
        width = console.measure(table, options=console.options.update(max_width=10_000)).maximum
        console.width = max(console.width, width)
    console.print(table)


def print_line(line: str) -> None:
    """Print a line as it is."""
    Console(emoji=False).print(line, markup=False, highlight=False, soft_wrap=True)
