"""Run `prune` or `shrink`, with measuring and saving around it.

Everything is on disk before a word is printed.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from wanda_lightning.cli.measure import logged_results, measure, metric_of
from wanda_lightning.cli.model_and_data import AnyData, data_for, load
from wanda_lightning.cli.options import JobOptions, Results, as_command, values_of
from wanda_lightning.cli.printing import print_line, print_table
from wanda_lightning.cli.sample_text import PROMPTS, continuations
from wanda_lightning.cli.saving import write_results
from wanda_lightning.common.aliases import Kwargs
from wanda_lightning.common.atomic_write import require_writable, resolve_path
from wanda_lightning.common.model_source import ModelSource
from wanda_lightning.config import PruningConfig
from wanda_lightning.data.images import ImageDataModule
from wanda_lightning.data.own_text import sample_windows
from wanda_lightning.data.sentences import SentenceDataModule
from wanda_lightning.data.text import TextDataModule
from wanda_lightning.data.text_sources import SELF
from wanda_lightning.evaluation import Evaluation, load_tasks
from wanda_lightning.evaluation.agreement import AfterBatch, Agreement
from wanda_lightning.evaluation.results import Metrics
from wanda_lightning.evaluation.tasks import Answers, answer, flips
from wanda_lightning.lightning_modules.model_loading import check_source
from wanda_lightning.report import Circumstances, Continuations, Measured, PruningReport
from wanda_lightning.report.descriptions import (
    METRICS,
    agreement_in_a_sentence,
    change_of,
    cost_of,
)
from wanda_lightning.streaming.checkpoint import Checkpoint
from wanda_lightning.streaming.measure_perplexity import measured_from_disk
from wanda_lightning.streaming.output_folder import PROGRESS_NAME, require_resumable
from wanda_lightning.streaming.shrinking_from_disk import changed_from_disk, refuse_from_disk
from wanda_lightning.verbs.shrink import carry_out, fitted_parts, refuse_parts

Parts = Sequence[PruningConfig]

_MIB = 2**20
_FEW_BYTES = 256 * _MIB  # of dense predictions, where memory is scarce


@dataclass
class _Measurement:
    """Metrics, texts and answers of one model; empty where they were not asked for."""

    metrics: dict[str, float] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)
    accuracies: dict[str, Metrics] = field(default_factory=dict)
    answers: Answers = field(default_factory=dict)
    size: float = 0.0  # MiB of the parameters; 0 for a model that was never in memory


@dataclass(frozen=True)
class _Done:
    """A changed model that is not saved yet, with what was measured before and after."""

    report: PruningReport
    module: Any  # None for a model that was never in memory
    data: AnyData
    dense: _Measurement
    pruned: _Measurement
    agreement: Agreement
    save: Callable[[], object]


def run_job(parts: Parts, options: JobOptions) -> None:
    """Prune or shrink a model, measure it before and after, and save what was asked for."""
    data = options.data
    results = options.results
    L.seed_everything(data.seed, verbose=False)
    tasks = {}
    if data.eval_zero_shot:
        tasks = load_tasks(["paper"], data.tasks_dir, options.model.cache_dir)

    run_it = _run_from_disk if results.stream else partial(_run_in_memory, tasks=tasks)
    with run_it(parts, options) as done:
        if results.save_model is not None:
            done.save()
        run = _circumstances(done, parts, options)
        described = {**done.report.config, "command": _given_values(options)}
        report = write_results(replace(done.report, run=run, config=described), options)
        if tasks:
            # They take hours for a large model, so everything is saved before, too.
            _answer(done.module, tasks, done.data, done.pruned)
            accuracies = done.pruned.accuracies
            for name, shares in flips(done.dense.answers, done.pruned.answers).items():
                accuracies[name] |= shares
            run = replace(run, zero_shot=accuracies, dense_zero_shot=done.dense.accuracies)
            report = write_results(replace(report, run=run), options)

    for line in _summary(report, run, results):
        print_line(line)
    if tasks:
        name = options.model.model
        both = {name: done.dense.accuracies, f"{name}, pruned": accuracies}
        print_table(Evaluation(both, dense=name).table())


def _answer(module: Any, tasks: Kwargs, data: Any, measured: _Measurement) -> None:
    """Let a model answer the tasks."""
    measured.accuracies, measured.answers = answer(
        module.model, module.tokenizer, tasks, data.batch_size
    )


@contextmanager
def _run_in_memory(parts: Parts, options: JobOptions, tasks: Kwargs) -> Iterator[_Done]:
    """Change a whole model; measure it before and after on the accelerator, if there is one."""
    model, _, data, results = options
    name = model.model
    if model.is_image:
        module = load(model, name, data.checkpoint)
        source = data_for(model, data, name, module)
    else:
        if model.is_language:
            check_source(model.source(name))
        source = data_for(model, data, name)
        if _reads_data(parts) and data.calibration != (SELF,):
            source.calibration_dataloader()  # a text that cannot be read is refused at once
        module = load(model, name)  # after the data, since it may be large

    if isinstance(source, SentenceDataModule):
        source.model = module.model
    parts = fitted_parts(parts, module.model, options.max_size, print_line)
    # Refuse what cannot be done, and a text that is too short, before the model is measured.
    refuse_parts(parts, module.model)
    batches = _calibration(parts, module, source)
    # The Trainer of a measurement chooses the same one.
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")

    agreement = Agreement()

    def measurement(is_dense: bool) -> _Measurement:
        size = sum(parameter.nbytes for parameter in module.model.parameters())
        measured = _Measurement(size=size / _MIB)
        if data.evaluation:
            measured.metrics.update(measure(module, source, agreement, is_dense))
        module.to(device)  # at its end, the Trainer moves the model to the CPU
        # Generation is slow, so it runs only for a page.
        if results.report and model.is_language:
            measured.texts.extend(continuations(module.model, module.tokenizer))
        return measured

    def on_device(batch: Any) -> Any:
        return module.transfer_batch_to_device(batch, device, 0)

    dense = measurement(is_dense=True)
    if tasks:
        _answer(module, tasks, source, dense)
    report = carry_out(
        parts,
        module.model,
        batches,
        lambda batch: module.calibration_step(on_device(batch)),
        lambda batch: module.calibration_predictions(on_device(batch)),
    )
    pruned = measurement(is_dense=False)
    save = partial(module.save_pretrained, results.save_model, results.overwrite)
    yield _Done(report, module, source, dense, pruned, agreement, save)


@contextmanager
def _run_from_disk(parts: Parts, options: JobOptions) -> Iterator[_Done]:
    """Change one block at a time. If what follows fails or is killed, the same command continues from there."""
    model, _, data, results = options
    hub = model.source(model.model)
    output = results.save_model or ""

    # Refuse what cannot be changed from disk or written, before the model is measured.
    require_resumable(output)
    continues = (resolve_path(output) / PROGRESS_NAME).is_file()
    if results.save is not None and not continues:
        require_writable(results.save, results.overwrite, "folder")
    check_source(hub)
    if options.max_size:
        whole = Checkpoint(hub, model.dtype)
        parts = fitted_parts(parts, whole.model, options.max_size, print_line, whole.sizes())
    refuse_from_disk(parts, hub)
    source: Any = data_for(model, data, model.model)
    batches = source.calibration_dataloader()

    agreement = Agreement(_FEW_BYTES)

    def measurement(path: str, is_dense: bool, dtype: str = "auto") -> _Measurement:
        measured = _Measurement()
        if data.evaluation:
            checkpoint = Checkpoint(ModelSource(path, **hub.hub), dtype, results.device)
            watching = agreement.storing if is_dense else agreement.comparing
            with watching(checkpoint.model) as after_batch:
                measured.metrics.update(_perplexities_from_disk(checkpoint, source, after_batch))
        return measured

    dense = measurement(model.model, True, model.dtype)
    with changed_from_disk(
        parts,
        hub,
        output,
        batches,
        tokenizer=source.tokenizer,
        dtype=model.dtype,
        device=results.device,
    ) as report:
        pruned = measurement(output, is_dense=False)
        # The model is in its folder already.
        yield _Done(report, None, source, dense, pruned, agreement, save=lambda: None)


def _reads_data(parts: Parts) -> bool:
    return any(part.data_reader for part in parts)


def _perplexities_from_disk(
    checkpoint: Checkpoint, source: TextDataModule, after_batch: AfterBatch
) -> dict[str, float]:
    """Return the perplexity on each text, with its standard error."""
    loaders: Any = source.val_dataloader()
    if not isinstance(loaders, list):
        loaders = [loaders]
    metrics = {}
    for number, name in enumerate(logged_results(source)):
        add = partial(after_batch, data=number)
        metric = measured_from_disk(checkpoint, loaders[number], after_batch=add)
        metrics[name] = float(metric.compute())
        error = metric.standard_error()
        if isfinite(error):
            metrics[f"{name}_stderr"] = error
    return metrics


def _calibration(parts: Parts, module: Any, source: AnyData) -> Any:
    """Return the calibration batches; None if nothing reads them."""
    if not _reads_data(parts) and not isinstance(source, ImageDataModule):
        return None
    if not isinstance(source, TextDataModule):
        return source.calibration_dataloader()
    if source.calibration == SELF:
        # No Trainer runs the model here, so the data module has no model that could write.
        windows = sample_windows(
            module.model, module.tokenizer, source.num_samples, source.seqlen, seed=source.seed
        )
        return DataLoader(windows, source.batch_size)  # type: ignore[arg-type]
    module.check_tokens(source.calibration_windows.clamp(min=0))  # -1 is padding
    return source.calibration_dataloader()


def _given_values(options: JobOptions) -> Kwargs:
    """Return the options of the command that have a value."""
    values = values_of(*options)
    return {name: value for name, value in values.items() if value not in (None, ())}


def _circumstances(done: _Done, parts: Parts, options: JobOptions) -> Circumstances:
    """Describe the run and its results."""
    model = options.model.model
    if options.data.checkpoint:
        model += f" ({options.data.checkpoint})"
    calibration = ""
    if _reads_data(parts):
        calibration = done.data.describe_calibration(done.data.num_samples)
    # A pattern such as 2:4 decides on the sparsity; any other command has to say it.
    is_pruned = parts[0].pattern.removes == "weights"
    always = ["sparsity"] if is_pruned and parts[0].pattern.fixed_sparsity is None else []
    run = Circumstances(
        command=as_command("prune" if is_pruned else "shrink", *options, always=always),
        model=model,
        calibration=calibration,
        costs=_costs(done, options.results.save_model),
        samples=tuple(map(Continuations, PROMPTS, done.dense.texts, done.pruned.texts)),
        date=datetime.now(UTC).date().isoformat(),
    )
    if not done.dense.metrics:
        return run

    first, *others = _results(done)
    return replace(run, metric=metric_of(done.data).name, **vars(first), others=tuple(others))


def _results(done: _Done) -> Iterator[Measured]:
    """Yield the results on each data set."""
    before = done.dense.metrics
    after = done.pruned.metrics
    for number, (name, description) in enumerate(logged_results(done.data).items()):
        error = f"{name}_stderr"
        yield Measured(
            data=description,
            before=before[name],
            after=after[name],
            before_error=before.get(error),
            after_error=after.get(error),
            agreement=done.agreement.metrics(number),
        )


def _costs(done: _Done, folder: str | None) -> tuple[Measured, ...]:
    """Return the size of both models; that after pruning is of the saved files, if any."""
    if done.module is None:  # it was never in memory
        return ()
    pruned = done.pruned.size
    if folder is not None:
        files = Path(folder).expanduser().glob("*.safetensors")
        pruned = sum(file.stat().st_size for file in files) / _MIB
    return (Measured("MiB of weights", done.dense.size, pruned),)


def _summary(report: PruningReport, run: Circumstances, results: Results) -> Iterator[str]:
    """Yield the lines that a run prints at its end."""
    yield report.summary()
    for result in run.results:
        yield change_of(METRICS[run.metric], result)
        sentence = agreement_in_a_sentence(result)
        if sentence:
            yield sentence
    for cost in run.costs:
        yield cost_of(cost)
    for note in report.notes:
        yield f"Note: {note}"

    if results.save_model:
        yield f"The model is in {results.save_model}."
    if results.save:
        yield f"The results are in {results.save}."
    if results.report:
        yield f"The report is in {results.report}."
    if not (results.save_model or results.save or results.report):
        yield "Nothing was saved. To save the model, add --save_model DIR; for the report, --save DIR."
