"""Run `prune` and `shrink`: `wanda_lightning.prune`, with measuring and saving around it.

Everything is on disk before a word is printed.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from wanda_lightning.cli.measuring import (
    AnyData,
    data_for,
    load,
    logged_names,
    measure,
    print_line,
    print_table,
)
from wanda_lightning.cli.options import Folder, Model, PruneOptions, as_command, values_of
from wanda_lightning.common.atomic_write import atomic_write, require_writable, resolve_path
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.evaluation_mode import evaluating
from wanda_lightning.common.wording import one_line
from wanda_lightning.config import PruningConfig
from wanda_lightning.data.own_text import sample_windows
from wanda_lightning.data.text import TextDataModule
from wanda_lightning.data.text_sources import SELF
from wanda_lightning.engine.prune import prune_as
from wanda_lightning.evaluation import Evaluation, load_tasks, zero_shot
from wanda_lightning.experts.removal import find_mixtures
from wanda_lightning.hub.card import write_card
from wanda_lightning.hub.upload import list_files, upload
from wanda_lightning.modules.model_loading import check_source, model_from_config
from wanda_lightning.planning.plan import make_plan, refuse_unprunable
from wanda_lightning.report import Circumstances, Continuations, Measured, PruningReport
from wanda_lightning.report.descriptions import METRICS, change_of, cost_of
from wanda_lightning.streaming import perplexity_from_disk, shrink_from_disk
from wanda_lightning.streaming.from_disk import pruned_from_disk, refuse_whole_model
from wanda_lightning.streaming.output_folder import PROGRESS_NAME, require_resumable
from wanda_lightning.units.shrink import shrink as shrink_in_memory

PROMPTS = ("The capital of France is", "To make a good cup of tea, first", "def is_prime(n):")
_NEW_TOKENS = 40
_MIB = 2**20


@dataclass(frozen=True)
class _Pruned:
    """A pruned model: its report, what was measured before and after, how it is saved, and text by both models."""

    report: PruningReport
    module: Any
    data: AnyData
    dense: Mapping[str, float]
    pruned: Mapping[str, float]
    save: Callable[[bool], object]  # True shrinks it
    samples: tuple[Continuations, ...] = ()


def prune(config: PruningConfig, options: PruneOptions) -> None:
    """Prune a model, measure it before and after, and save what was asked for."""
    model, _, data, results = options
    L.seed_everything(data.seed, verbose=False)
    tasks = load_tasks(["paper"], data.tasks_dir, model.cache_dir) if data.eval_zero_shot else {}
    with (_prune_from_disk if results.stream else _prune_in_memory)(config, options) as done:
        is_smaller, lines = (
            (False, []) if results.save_model is None else _save(done, results.shrink)
        )
        run = replace(
            _run_of(done, config, options), costs=_costs(done, results.save_model, is_smaller)
        )
        command = {
            name: each for name, each in values_of(*options).items() if each not in (None, ())
        }
        report = replace(done.report, run=run, config={**done.report.config, "command": command})
        if is_smaller:
            report = report.marked_as_shrunk()
        report, files = _write(report, options)
        if tasks:  # which take hours for a large model, so everything is saved before
            found = zero_shot(done.module.model, done.module.tokenizer, tasks, done.data.batch_size)
            report, _ = _write(replace(report, run=replace(run, zero_shot=found)), options)
    print_line(report.summary())
    lines += [change_of(METRICS[run.metric], each) for each in run.results]
    lines += [cost_of(each) for each in run.costs]
    places = {
        "The model is": results.save_model,
        "The results are": results.save,
        "The report is": results.report,
    }
    saved = [f"{what} in {place}." for what, place in places.items() if place]
    nothing = (
        "Nothing was saved. To save the model, add --save_model DIR; for the report, --save DIR."
    )
    for line in (*lines, *(f"Note: {note}" for note in report.notes), *(saved or [nothing])):
        print_line(line)
    if tasks:
        print_table(Evaluation({f"{model.model}, pruned": found}).table())
    _upload(results, files)


@contextmanager
def _prune_in_memory(config: PruningConfig, options: PruneOptions) -> Iterator[_Pruned]:
    model, _, data, results = options
    _keep_freed_memory()
    if not model.is_image:
        check_source(model.source(model.model))
    classifier = load(model, model.model, data.checkpoint) if model.is_image else None
    source = data_for(model, data, model.model, classifier)
    module = classifier or load(model, model.model)  # after the data, since it may be large
    plan = make_plan(config, module.model)
    refuse_unprunable(plan.layers)  # before the model is measured
    if plan.config.pattern.drops_experts:
        find_mixtures(config, module.model, plan.inventory)
    batches = _calibration(config, module, source)  # to refuse a text that is too short, too
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")

    def measured() -> tuple[dict[str, float], list[str]]:
        found = measure(module, source) if data.evaluation else {}
        module.to(device)
        return found, continuations(
            module.model, module.tokenizer
        ) if results.report and classifier is None else []

    dense, before = measured()
    steps = module.calibration_step, module.calibration_predictions
    forward, predict = (
        lambda batch, run=run: run(module.transfer_batch_to_device(batch, device, 0))
        for run in steps
    )
    report = prune_as(plan, batches, forward=forward, predict=predict)
    pruned, after = measured()
    save = partial(module.save_pretrained, results.save_model, results.overwrite)
    yield _Pruned(
        report,
        module,
        source,
        dense,
        pruned,
        save,
        tuple(map(Continuations, PROMPTS, before, after)),
    )


@contextmanager
def _prune_from_disk(config: PruningConfig, options: PruneOptions) -> Iterator[_Pruned]:
    """Prune one block at a time. If what follows fails or is killed, the same command continues from there."""
    model, _, data, results = options
    hub = model.source(model.model)
    output = results.save_model or ""
    device = results.device
    refuse_whole_model(config)
    require_resumable(output)
    if results.save is not None and not (resolve_path(output) / PROGRESS_NAME).is_file():
        require_writable(results.save, results.overwrite, "folder")
    check_source(hub)
    if config.pattern.drops_experts:  # before the model is measured
        plan = make_plan(config, model_from_config(hub), by_block=True)
        find_mixtures(config, plan.model, plan.inventory)
    source: Any = data_for(model, data, model.model)
    batches = source.calibration_dataloader()

    def perplexities(path: str, dtype: str = "auto") -> dict[str, float]:
        loaders: Any = source.val_dataloader() if data.evaluation else []
        read = partial(perplexity_from_disk, path, dtype=dtype, device=device, **hub.hub)
        found = map(read, loaders if isinstance(loaders, list) else [loaders])
        return dict(zip(logged_names(source), found, strict=bool(data.evaluation)))

    dense = perplexities(model.model, model.dtype)
    how = {"tokenizer": source.tokenizer, "dtype": model.dtype, "device": device}
    with pruned_from_disk(config, hub, output, batches, **how) as report:
        shrinking = partial(shrink_from_disk, output, output, overwrite=True, **hub.hub)
        yield _Pruned(
            report, None, source, dense, perplexities(output), lambda shrink: shrink and shrinking()
        )


def shrink(model: Model, results: Folder) -> None:
    """Shrink a model and save it; without a folder, say what could be taken out."""
    folder = results.save_model
    hub = model.source(model.model).hub
    if folder is None:
        print_line(str(shrink_in_memory(load(model, model.model).model)))
        print_line("Nothing was saved. To save the smaller model, add --save_model DIR.")
        return
    if results.stream:
        found = shrink_from_disk(model.model, folder, results.overwrite, dtype=model.dtype, **hub)
    else:
        found = load(model, model.model).save_pretrained(folder, results.overwrite, shrink=True)
    print_line(f"{found}\nThe model is in {folder}.")
    _upload(results, list_files(folder))


def _calibration(config: PruningConfig, module: Any, source: AnyData) -> Any:
    """Return the calibration batches; None if nothing reads them."""
    if isinstance(source, TextDataModule) and config.data_reader is None:
        return None
    if isinstance(source, TextDataModule) and source.calibration == SELF:
        windows = sample_windows(
            module.model, module.tokenizer, source.num_samples, source.seqlen, seed=source.seed
        )
        return DataLoader(windows, source.batch_size)  # type: ignore[arg-type]
    if isinstance(source, TextDataModule):
        module.check_tokens(source.calibration_windows)
    return source.calibration_dataloader()


def _keep_freed_memory() -> None:
    """Let glibc keep the memory that tensors free: mapping every page anew takes up to a fifth of a forward pass."""
    with suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**31 - 1)  # M_MMAP_THRESHOLD of malloc.h
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def _run_of(done: _Pruned, config: PruningConfig, options: PruneOptions) -> Circumstances:
    """Describe the run and its results."""
    (model, _, given, _), data = options, done.data
    names = logged_names(data) if done.dense else []
    measured = [
        Measured(
            data.describe_evaluation(*[number] * (number > 0)), done.dense[name], done.pruned[name]
        )
        for number, name in enumerate(names)
    ]
    return Circumstances(
        command=as_command(
            "prune", *options, always=["sparsity"] if config.pattern.fixed_sparsity is None else []
        ),
        model=f"{model.model} ({given.checkpoint})" if given.checkpoint else model.model,
        metric=next(
            (metric.name for metric in METRICS.values() if {*names} & {*metric.logged}), ""
        ),
        **(vars(measured[0]) if measured else {}),
        others=tuple(measured[1:]),
        calibration=""
        if config.data_reader is None
        else data.describe_calibration(data.num_samples),
        samples=done.samples,
    )


def _costs(done: _Pruned, folder: str | None, is_smaller: bool) -> tuple[Measured, ...]:
    """Return the size and the speed of both models; the size after pruning is that of the saved files, if any."""
    if done.module is None:  # it was never in memory
        return ()
    dense = sum(parameter.nbytes for parameter in done.module.model.parameters()) / _MIB
    files = Path(folder).expanduser().glob("*.safetensors") if folder is not None else ()
    saved = sum(file.stat().st_size for file in files) / _MIB
    costs = [Measured("MiB of weights", dense, saved or dense)]
    if "speed" in done.dense and not is_smaller:  # what ran is the model with its zeros
        unit = "tokens" if isinstance(done.data, TextDataModule) else "images"
        costs.append(Measured(f"{unit} per second", done.dense["speed"], done.pruned["speed"]))
    return tuple(costs)


def _save(done: _Pruned, shrink: bool) -> tuple[bool, list[str]]:
    """Save the model; return whether hidden units were left out, and what to print about it."""
    lines = []
    if shrink:
        try:
            return True, [str(done.save(True))]
        except UserError as error:  # pruning may have taken hours
            lines = [f"Note: the model is saved with its zeros. {error}"]
    done.save(False)
    return False, lines


def _write(report: PruningReport, options: PruneOptions) -> tuple[PruningReport, list[str]]:
    """Write the card of the model and the results; return the report, with a note on a failure, and the files."""
    (_, pruning, _, results), run, files = options, report.run or Circumstances(), []
    if results.save_model is not None:
        hub_id = results.push_to_hub
        try:
            write_card(
                results.save_model,
                report,
                name=hub_id or results.save_model,
                on_hub=hub_id is not None,
            )
        except Exception as error:  # the saved model and the results matter more
            note = f"no model card could be written into {results.save_model}: {one_line(error)}"
            report = replace(report, notes=(*report.notes, note))
        files = list_files(results.save_model)  # before others are written among them
    if results.save is not None:
        folder = Path(results.save).expanduser()
        report.save(folder)
        columns = {"method": pruning.name, "actual_sparsity": f"{report.sparsity:.4f}"}
        if run.metric:
            columns[METRICS[run.metric].column] = f"{run.after:.4f}"
        with atomic_write(folder / f"log_{pruning.name}.txt") as temporary:
            temporary.write_text(
                "\t".join(columns) + "\n" + "\t".join(columns.values()) + "\n", encoding="utf-8"
            )
    if results.report is not None:
        report.save(results.report)
    return report, files


def _upload(results: Folder, files: list[str]) -> None:
    """Upload files of the saved model if a repository is given. Call it last, since it may fail."""
    if results.push_to_hub is not None and (folder := results.save_model) is not None:
        print_line(
            f"Uploaded {folder} to {upload(folder, results.push_to_hub, files, results.private)}."
        )


def continuations(model: Any, tokenizer: Any) -> list[str]:
    """Continue each prompt; warn, and return nothing, if the model cannot generate text."""
    try:
        with evaluating(model):
            return [continuation(model, tokenizer, prompt) for prompt in PROMPTS]
    except Exception as error:  # code of the model, whose errors must not end a run that has pruned
        name = type(model).__name__
        warnings.warn(
            f"{name} cannot continue a prompt, so the report has no text: {one_line(error)}",
            stacklevel=2,
        )
        return []


def continuation(model: Any, tokenizer: Any, prompt: str) -> str:
    """Return the most likely tokens after a prompt, at most 40 and as many as fit into the model's context."""
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    length = inputs.input_ids.shape[1]
    context = (
        getattr(model.config.get_text_config(), "max_position_embeddings", 0)
        or length + _NEW_TOKENS
    )
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    how = {"max_new_tokens": min(_NEW_TOKENS, context - length), "pad_token_id": padding or 0}
    # Whatever the model's own are.
    greedy = {
        "do_sample": False,
        "temperature": None,
        "top_p": None,
        "top_k": None,
    }
    return tokenizer.decode(
        model.generate(**inputs, **how, **greedy)[0, length:], skip_special_tokens=True
    )
