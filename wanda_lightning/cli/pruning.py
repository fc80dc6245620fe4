"""Run `prune` and `shrink`: `wanda_lightning.prune`, with measuring and saving around it.

Everything is on disk before a word is printed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from rich.table import Table
from torch.utils.data import DataLoader

from wanda_lightning.cli.examples import Examples
from wanda_lightning.cli.measuring import checked_seqlen, load, measure, refuse_long_windows
from wanda_lightning.cli.options import Data, Folder, Model, PruneOptions
from wanda_lightning.cli.output import print_line, print_table
from wanda_lightning.cli.parsing import as_command, values_of
from wanda_lightning.common.atomic_write import atomic_write, require_space, require_writable, resolve_path
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.model_source import load_config, load_tokenizer
from wanda_lightning.common.words import one_line
from wanda_lightning.config import PruningConfig
from wanda_lightning.data import ImageDataModule, TextDataModule, sample_windows
from wanda_lightning.data.text_sources import SELF
from wanda_lightning.engine.drop_experts import find_mixtures
from wanda_lightning.engine.plan import make_plan
from wanda_lightning.engine.prune import prune_as
from wanda_lightning.evaluation import Evaluation, load_tasks, task_names, zero_shot
from wanda_lightning.hub.card import write_card
from wanda_lightning.hub.upload import list_files, upload
from wanda_lightning.modules.loading import check_decoder_only
from wanda_lightning.report import LEFT_OUT, Measured, PruningReport, Run
from wanda_lightning.report.descriptions import METRICS, PERPLEXITY, TOP1, change_of
from wanda_lightning.shrinking import shrink as shrink_in_memory
from wanda_lightning.streaming import perplexity_from_disk, shrink_from_disk
from wanda_lightning.streaming.checkpoint import available_device
from wanda_lightning.streaming.from_disk import pruned_from_disk, refuse_whole_model
from wanda_lightning.streaming.output_folder import PROGRESS_NAME, require_resumable

_NO_TEXT = (
    "no text by the dense and the pruned model is shown, since --stream never has a whole model in memory to write it"
)


class _Pruned(NamedTuple):
    """A pruned model: its report, what was measured before and after, and how it is saved."""

    report: PruningReport
    data: TextDataModule | ImageDataModule
    dense: Mapping[str, float]
    pruned: Mapping[str, float]
    save: Callable[[bool], object]  # True shrinks it
    zero_shot: Callable[[], Any]
    examples: Mapping[str, Any] = {}


def prune(config: PruningConfig, options: PruneOptions) -> None:
    """Prune a model, measure it before and after, and save what was asked for."""
    L.seed_everything(options.data.seed, verbose=False)
    results = options.results
    with (_prune_from_disk if results.stream else _prune_in_memory)(config, options) as done:
        report = done.report
        report.run = _run_of(done, config, options)
        report.config["command"] = _given(done.data, options)
        lines = [] if results.save_model is None else _save(done, results.shrink)
        files = _write(report, options)
        if accuracies := done.zero_shot():  # takes hours for a large model, so everything is saved before
            report.run = replace(report.run, zero_shot=accuracies)
            _write(report, options)
    _print(report, options, lines)
    if accuracies:
        print_table(Evaluation({f"{options.model.model}, pruned": accuracies}).table())
    _upload(results, files)


@contextmanager
def _prune_in_memory(config: PruningConfig, options: PruneOptions) -> Iterator[_Pruned]:
    model, _, data, results = options
    _keep_freed_memory()
    tasks = load_tasks(task_names(["paper"]), data.tasks_dir, model.cache_dir) if data.eval_zero_shot else {}
    module, source = _load(model, data)
    plan = make_plan(config, module.model)  # to refuse the model before it is measured
    if plan.config.pattern.drops_experts:
        find_mixtures(plan)
    if results.save_model is not None:
        require_space(results.save_model, sum(each.nbytes for each in (*module.parameters(), *module.buffers())))
    batches = _calibration(config, module, source, data)  # to refuse a text that is too short, too
    before, after = (Examples.of(source) if results.report else Examples() for _ in range(2))
    dense = measure(module, source, before) if data.evaluation else {}
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    module.to(device)
    steps = module.calibration_step, module.calibration_predictions
    forward, predict = (lambda batch, run=run: run(module.transfer_batch_to_device(batch, device, 0)) for run in steps)
    report = prune_as(config, module.model, batches, forward=forward, predict=predict)
    pruned = measure(module, source, after) if data.evaluation else {}
    yield _Pruned(
        report,
        source,
        dense,
        pruned,
        lambda shrink: module.save_pretrained(results.save_model, overwrite=results.overwrite, shrink=shrink),
        lambda: zero_shot(module.model, module.tokenizer, tasks, source.batch_size) if tasks else {},
        after.since(before),
    )


@contextmanager
def _prune_from_disk(config: PruningConfig, options: PruneOptions) -> Iterator[_Pruned]:
    """Prune one block at a time. If what follows fails or is killed, the same command continues from there."""
    model, _, data, results = options
    hub, output, device = model.source(model.model), results.save_model or "", results.device
    refuse_whole_model(config)
    available_device(device)
    require_resumable(output)
    if results.save is not None and not (resolve_path(output) / PROGRESS_NAME).is_file():
        require_writable(results.save, results.overwrite, "folder")
    configuration, tokenizer = load_config(hub), load_tokenizer(hub)
    check_decoder_only(configuration)
    source = _text(model, data, tokenizer, configuration)
    batches = source.calibration_dataloader()

    def perplexities(path: str, dtype: str = "auto") -> dict[str, float]:
        loaders: Any = source.val_dataloader() if data.evaluation else []
        read = partial(perplexity_from_disk, path, dtype=dtype, device=device, **hub.hub)
        results = map(read, loaders if isinstance(loaders, list) else [loaders])
        return dict(zip(_logged_names(source), results, strict=bool(data.evaluation)))

    dense = perplexities(model.model, model.dtype)
    pruning = pruned_from_disk(config, hub, output, batches, tokenizer=tokenizer, dtype=model.dtype, device=device)
    with pruning as report:
        if results.report is not None:
            report.notes.append(_NO_TEXT)
        shrinking = partial(shrink_from_disk, output, output, overwrite=True, **hub.hub)
        yield _Pruned(report, source, dense, perplexities(output), lambda shrink: shrink and shrinking(), dict)


def shrink(model: Model, results: Folder) -> None:
    """Shrink a model and save it; without a folder, say what could be taken out."""
    folder = results.save_model
    if folder is None:
        print_line(str(shrink_in_memory(load(model, model.model).model)))
        print_line("Nothing was saved. To save the smaller model, add --save_model DIR.")
        return
    if results.stream:
        hub = model.source(model.model).hub
        found = shrink_from_disk(model.model, folder, results.overwrite, dtype=model.dtype, **hub)
    else:
        found = load(model, model.model).save_pretrained(folder, overwrite=results.overwrite, shrink=True)
    print_line(f"{found}\nThe model is in {folder}.")
    _upload(results, list_files(folder))


# -------------------------------------------------------------------------------------------------- models and data


def _load(model: Model, data: Data) -> tuple[Any, TextDataModule | ImageDataModule]:
    if not model.is_image:
        refuse_long_windows(data.seqlen, model.source(model.model))
        module = load(model, model.model)
        return module, _text(model, data, module.tokenizer, module.model.config)
    module = load(model, model.model, data.checkpoint)
    images = ImageDataModule(
        data.data or "",
        module,
        batch_size=data.batch_size or 64,
        num_samples=data.num_samples or 4096,
        seed=data.seed,
        cache_dir=model.cache_dir,
    )
    images.prepare_data()
    images.setup()
    return module, images


def _text(model: Model, data: Data, tokenizer: Any, config: Any) -> TextDataModule:
    return TextDataModule(
        tokenizer,
        data.calibration,
        data.evaluation or "python-docs",  # which is not read
        seqlen=checked_seqlen(data.seqlen, config),
        num_samples=data.num_samples or 128,
        batch_size=data.batch_size or 4,
        limit=data.limit,
        seed=data.seed,
        cache_dir=model.cache_dir,
    )


def _calibration(config: PruningConfig, module: Any, source: Any, data: Data) -> Any:
    """Return the calibration batches; None if nothing reads them."""
    if config.data_reader is None and isinstance(source, TextDataModule):
        return None
    if isinstance(source, TextDataModule) and source.calibration == SELF:
        windows: Any = sample_windows(module.model, module.tokenizer, source.num_samples, source.seqlen, seed=data.seed)
        return DataLoader(windows, source.batch_size)
    return source.calibration_dataloader()


def _keep_freed_memory() -> None:
    """Let glibc keep the memory that tensors free, where it would map and clear every page anew for the next tensor.

    That is up to a fifth of the time of a forward pass. A command owns its process, so it may do so. Not for models
    that are read block by block, whose memory has to go back.
    """
    with suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**31 - 1)  # M_MMAP_THRESHOLD of malloc.h
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


# --------------------------------------------------------------------------------------------------------- results


def _logged_names(data: TextDataModule | ImageDataModule) -> list[str]:
    """Return the names under which a Trainer logs the result on each data set."""
    if isinstance(data, ImageDataModule):
        return [TOP1.logged[0]]
    first = PERPLEXITY.logged[0]
    return [first, *(f"{first}/{text}" for text in data.evaluations[1:])]


def _run_of(done: _Pruned, config: PruningConfig, options: PruneOptions) -> Run:
    """Describe the run and its results."""
    data, checkpoint = done.data, options.data.checkpoint
    always = ("sparsity",) if config.pattern.fixed_sparsity is None else ()
    run = Run(
        command=as_command("prune", *options, always=always),
        model=f"{options.model.model} ({checkpoint})" if checkpoint else options.model.model,
        calibration="" if config.data_reader is None else data.describe_calibration(data.num_samples),
        **done.examples,
    )
    if not done.dense:
        return run
    measured = [
        Measured(data.describe_evaluation(*[number] * (number > 0)), done.dense[name], done.pruned[name])
        for number, name in enumerate(_logged_names(data))
    ]
    metric = TOP1.name if isinstance(data, ImageDataModule) else PERPLEXITY.name
    return replace(run, metric=metric, **vars(measured[0]), others=tuple(measured[1:]))


def _given(data: TextDataModule | ImageDataModule, options: PruneOptions) -> dict[str, Any]:
    """Return the options as they were used."""
    given = {name: value for name, value in values_of(*options).items() if value not in (None, ())}
    used = ("num_samples", "batch_size", "seqlen")
    return given | {name: getattr(data, name) for name in used if hasattr(data, name)}


def _save(done: _Pruned, shrink: bool) -> list[str]:
    """Save the model, and return what to print of what was left out."""
    if shrink:
        try:
            line = str(done.save(True))
            done.report.notes.append(LEFT_OUT)
            return [line]
        except UserError as error:  # pruning may have taken hours
            done.save(False)
            return [f"Note: the model is saved with its zeros. {error}"]
    done.save(False)
    return []


def _write(report: PruningReport, options: PruneOptions) -> list[str]:
    """Write the card of the model and the results, and return the files of the model."""
    results, name, files = options.results, options.pruning.name, []
    assert report.run is not None
    if results.save_model is not None:
        named = results.push_to_hub or results.save_model
        try:
            write_card(Path(results.save_model), report, name=named, on_hub=results.push_to_hub is not None)
        except Exception as error:  # the saved model and the results matter more
            report.notes.append(f"no model card could be written into {results.save_model}: {one_line(error)}")
        files = list_files(results.save_model)  # before others are written among them
    if results.save is not None:
        folder = Path(results.save).expanduser()
        report.save(folder)
        columns = {"method": name, "actual_sparsity": f"{report.sparsity:.4f}"}
        if report.run.metric:
            columns[METRICS[report.run.metric].column] = f"{report.run.after:.4f}"
        with atomic_write(folder / f"log_{name}.txt") as temporary:
            text = "\n".join(map("\t".join, (columns, columns.values())))
            temporary.write_text(f"{text}\n", encoding="utf-8")
    if results.report is not None:
        report.write(results.report)
    return files


def _print(report: PruningReport, options: PruneOptions, lines: list[str]) -> None:
    results, run = options.results, report.run
    assert run is not None
    cells = {"method": options.pruning.name, "sparsity": f"{report.sparsity:.2%}"}
    cells["of the model"] = f"{report.model_sparsity:.2%}"
    if run.metric:
        metric = METRICS[run.metric]
        cells |= {f"dense {run.metric}": metric.text(run.before), f"pruned {run.metric}": metric.text(run.after)}
        lines = [*(change_of(metric, each) for each in run.others), *lines]
    cells["seconds to prune"] = f"{report.total_seconds:.1f}"
    table = Table()
    for column in cells:
        table.add_column(column, justify="left" if column == "method" else "right")
    table.add_row(*cells.values())
    print_table(table)
    places = {"The model is": results.save_model, "The results are": results.save, "The report is": results.report}
    saved = [f"{what} in {place}." for what, place in places.items() if place]
    for line in (*lines, *(f"Note: {note}" for note in report.notes), *saved):
        print_line(line)
    if not saved:
        print_line("Nothing was saved. To save the model, add --save_model DIR; for the report, --save DIR.")


def _upload(results: Folder, files: list[str]) -> None:
    """Upload files of the saved model if a repository is given. Call it last, since it may fail."""
    if results.push_to_hub is not None and (folder := results.save_model) is not None:
        print_line(f"Uploaded {folder} to {upload(folder, results.push_to_hub, files, results.private)}.")
