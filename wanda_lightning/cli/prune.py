"""`wanda-lightning prune`: prune a model, and measure it before and after."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from rich.markup import escape
from rich.table import Table

from wanda_lightning.callbacks import PruningCallback
from wanda_lightning.cli.allocator import keep_freed_memory
from wanda_lightning.cli.common_options import (
    IMAGES_AT_ONCE,
    PAPER_IMAGES,
    PAPER_SEQLEN,
    PAPER_SEQUENCES,
    SEQUENCES_AT_ONCE,
)
from wanda_lightning.cli.examples import Examples, ImageExamples, TextExamples
from wanda_lightning.cli.explain import as_usage_errors
from wanda_lightning.cli.measure import (
    checked_seqlen,
    measure,
    push,
    refuse_long_windows,
    refuse_no_space,
    save_model,
    tolerating_no_card,
)
from wanda_lightning.cli.output import print_line, print_table
from wanda_lightning.cli.parser import as_command, as_given
from wanda_lightning.cli.pruning_options import PruneOptions
from wanda_lightning.common.atomic_write import atomic_write
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.model_source import load_config, load_tokenizer
from wanda_lightning.config import PruningConfig
from wanda_lightning.data import ImageDataModule, TextDataModule
from wanda_lightning.data.text_sources import SELF
from wanda_lightning.engine.drop_experts import find_mixtures
from wanda_lightning.engine.plan import make_plan
from wanda_lightning.evaluation import Evaluation, load_tasks, task_names, zero_shot
from wanda_lightning.hub.card import write_card
from wanda_lightning.hub.upload import list_files
from wanda_lightning.modules import CausalLMModule, ImageClassifierModule
from wanda_lightning.modules.loading import check_decoder_only
from wanda_lightning.report import LEFT_OUT, Measured, PruningReport, Run
from wanda_lightning.report.descriptions import change_of
from wanda_lightning.report.metrics import METRICS, PERPLEXITY, TOP1, Metric
from wanda_lightning.streaming import perplexity_from_disk, shrink_from_disk
from wanda_lightning.streaming.checkpoint import available_device
from wanda_lightning.streaming.from_disk import pruned_from_disk, refuse_whole_model

_NO_TEXT = (
    "no text by the dense and the pruned model is shown, since --stream never has a whole model in memory to write it"
)


def run(options: PruneOptions) -> None:
    """Prune a model, measure it before and after, and save what was asked for."""
    if options.stream:
        return _stream(options)
    keep_freed_memory()
    samples = options.num_samples or (PAPER_IMAGES if options.is_image else PAPER_SEQUENCES)
    callback = PruningCallback(**options.choices, num_samples=samples)
    tasks = load_tasks(task_names(["paper"]), options.tasks_dir, options.cache_dir) if options.eval_zero_shot else {}
    L.seed_everything(options.seed, verbose=False)
    module, data = _load(options, samples)
    plan = make_plan(callback.config, module.model)  # to refuse the model before it is measured
    if plan.config.pattern.drops_experts:
        find_mixtures(plan)
    refuse_no_space(options.save_model, module)
    if callback.config.data_reader and isinstance(data, TextDataModule) and data.calibration != SELF:
        _ = data.calibration_windows  # to refuse a short text, too
    before, after = (_examples(options, data) for _ in range(2))
    dense, pruned = measure(module, data, before), measure(module, data, callback, after)
    report = callback.report
    assert report is not None
    run = replace(_record_run(report, options, data, callback.config, dense, pruned), **after.since(before))
    report.run = run
    folder = _save_model(module, options, report)
    _write_card(folder, options, report)
    files = list_files(folder) if folder else []
    try:
        if tasks:  # takes hours for a large model, so it is saved before
            accuracies = zero_shot(module.model, module.tokenizer, tasks, data.batch_size)
            report.run = replace(run, zero_shot=accuracies)
            _write_card(folder, options, report)
    finally:
        _write_results(options, report)
    _print_results(options.name, report)
    if tasks:
        print_table(Evaluation({f"{options.model}, pruned": accuracies}).table())
    if not (options.save_model or options.save or options.report):
        print_line("Nothing was saved. To save the model, add --save_model DIR; for the report, --save DIR.")
    push(folder, files, options)
    return None


def _save_model(module: Any, options: PruneOptions, report: PruningReport) -> Path | None:
    if options.shrink:
        with _tolerating_zeros(report):
            return save_model(module, options.save_model, options.overwrite, shrink=True)
    return save_model(module, options.save_model, options.overwrite)


@contextmanager
def _tolerating_zeros(report: PruningReport) -> Iterator[None]:
    """Print a note if the zeros cannot be taken out, since pruning may have taken hours; else the report has one."""
    try:
        yield
    except UserError as error:
        print_line(f"Note: the model is saved with its zeros. {error}")
    else:
        report.notes.append(LEFT_OUT)


def _stream(options: PruneOptions) -> None:
    """Prune from disk, one block at a time."""
    source, output = options.source(options.model), options.save_model or ""
    choices = PruningConfig.from_names(**options.choices)
    with as_usage_errors():
        refuse_whole_model(choices)
        available_device(options.device)
    L.seed_everything(options.seed, verbose=False)
    config, tokenizer = load_config(source), load_tokenizer(source)
    refuse_long_windows(options.seqlen, source)
    check_decoder_only(config)
    data = _text(options, tokenizer, config)
    dtype = options.dtype or "auto"
    read = partial(perplexity_from_disk, device=options.device, **source.hub)
    dense = _perplexities(partial(read, source.name, dtype=dtype), data)
    batches = data.calibration_dataloader()
    where: dict[str, Any] = {"dtype": dtype, "device": options.device}
    with pruned_from_disk(choices, source, output, batches, tokenizer=tokenizer, **where) as report:
        pruned = _perplexities(partial(read, output), data)
        _record_run(report, options, data, choices, dense, pruned)
        if options.shrink:
            with _tolerating_zeros(report):
                print_line(str(shrink_from_disk(output, output, overwrite=True, **source.hub)))
        _write_card(Path(output), options, report)
        files = list_files(output)
        if options.report is not None:
            report.notes.append(_NO_TEXT)
        _write_results(options, report)
    _print_results(options.name, report)
    push(Path(output), files, options)


def _perplexities(read: Callable[..., float], data: TextDataModule) -> dict[str, float]:
    """Return the perplexity on each text, by the names under which a Trainer logs them."""
    loaders = data.val_dataloader()
    results = map(read, loaders if isinstance(loaders, list) else [loaders])
    return dict(zip(_logged_names(PERPLEXITY, data), results, strict=True))


def _load(options: PruneOptions, samples: int) -> tuple[Any, TextDataModule | ImageDataModule]:
    if not options.is_image:
        source = options.source(options.model)
        refuse_long_windows(options.seqlen, source)
        module: Any = CausalLMModule(source.name, dtype=options.dtype or "auto", **source.hub)
        return module, _text(options, module.tokenizer, module.model.config)
    assert options.data is not None
    module = ImageClassifierModule(options.model, pretrained=options.checkpoint is None, checkpoint=options.checkpoint)
    data = ImageDataModule(
        options.data,
        module,
        batch_size=options.batch_size or IMAGES_AT_ONCE,
        num_samples=samples,
        seed=options.seed,
        cache_dir=options.cache_dir,
    )
    return module, data


def _text(options: PruneOptions, tokenizer: Any, config: Any) -> TextDataModule:
    return TextDataModule(
        tokenizer,
        options.calibration or "c4",
        ["wikitext2"] if options.evaluation is None else options.evaluation,
        seqlen=checked_seqlen(options.seqlen, config, PAPER_SEQLEN),
        num_samples=options.num_samples or PAPER_SEQUENCES,
        batch_size=options.batch_size or SEQUENCES_AT_ONCE,
        limit=options.limit,
        seed=options.seed,
        cache_dir=options.cache_dir,
    )


def _examples(options: PruneOptions, data: TextDataModule | ImageDataModule) -> Examples:
    if options.report is None:
        return Examples()
    return ImageExamples(data) if isinstance(data, ImageDataModule) else TextExamples()


def _record_run(
    report: PruningReport,
    options: PruneOptions,
    data: TextDataModule | ImageDataModule,
    config: PruningConfig,
    dense: Mapping[str, float],
    pruned: Mapping[str, float],
) -> Run:
    """Record the options and the results in the report, and return the results."""
    used: dict[str, Any] = {"num_samples": data.num_samples, "batch_size": data.batch_size}
    if isinstance(data, ImageDataModule):
        metric, measured_on = TOP1, [data.describe_evaluation()]
    else:
        used |= {"seqlen": data.seqlen, "calibration": data.calibration, "evaluation": list(data.evaluations)}
        metric, measured_on = PERPLEXITY, [data.describe_evaluation(number) for number in range(len(data.evaluations))]
    report.config["command"] = as_given(options) | used
    logged = _logged_names(metric, data)
    first, *others = [Measured(text, dense[name], pruned[name]) for text, name in zip(measured_on, logged, strict=True)]
    report.run = Run(
        command=as_command("prune", options, always=("sparsity",) if config.pattern.fixed_sparsity is None else ()),
        model=f"{options.model} ({options.checkpoint})" if options.checkpoint else options.model,
        metric=metric.name,
        before=first.before,
        after=first.after,
        data=first.data,
        others=tuple(others),
        calibration="" if config.data_reader is None else data.describe_calibration(data.num_samples),
    )
    return report.run


def _logged_names(metric: Metric, data: TextDataModule | ImageDataModule) -> list[str]:
    """Return the names under which a Trainer logs the result on each data set."""
    name, _ = metric.logged
    texts = () if isinstance(data, ImageDataModule) else data.evaluations[1:]
    return [name, *(f"{name}/{text}" for text in texts)]


def _write_card(folder: Path | None, options: PruneOptions, report: PruningReport) -> None:
    if folder is None:
        return
    with tolerating_no_card(folder):
        write_card(folder, report, name=options.push_to_hub or folder, on_hub=options.push_to_hub is not None)


def _write_results(options: PruneOptions, report: PruningReport) -> None:
    assert report.run is not None
    if options.save is not None:
        folder = Path(options.save)
        report.save(folder)
        headings = f"method\tactual_sparsity\t{METRICS[report.run.metric].column}\n"
        numbers = f"{options.name}\t{report.sparsity:.4f}\t{report.run.after:.4f}\n"
        with atomic_write(folder / f"log_{options.name}.txt") as temporary:
            temporary.write_text(headings + numbers, encoding="utf-8")
    if options.report is not None:
        report.write(options.report)
        print_line(f"The report is in {options.report}.")


def _print_results(method: str, report: PruningReport) -> None:
    assert report.run is not None
    run, metric, table = report.run, METRICS[report.run.metric], Table()
    columns = ("sparsity", "of the model", f"dense {metric.name}", f"pruned {metric.name}", "seconds to prune")
    for column in ("method", *columns):
        table.add_column(column, justify="left" if column == "method" else "right")
    numbers = [f"{value:.2%}" for value in (report.sparsity, report.model_sparsity)]
    numbers += [metric.text(value) for value in (run.before, run.after)]
    table.add_row(escape(method), *numbers, f"{report.total_seconds:.1f}")
    print_table(table)
    for each in run.others:
        print_line(change_of(metric, each))
    for note in report.notes:
        print_line(f"Note: {note}")
