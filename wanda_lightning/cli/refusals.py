"""Refuse, before anything is loaded, options that would be ignored and places that cannot be used.

Contradictions between choices are refused by `PruningConfig`, and wrong data by the data modules.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from wanda_lightning.cli.options import (
    TIMM,
    File,
    Folder,
    Measurements,
    Model,
    Models,
    PruneOptions,
)
from wanda_lightning.cli.parsing import given_in
from wanda_lightning.common.atomic_write import require_writable, resolve_path
from wanda_lightning.common.checks import check_report_path
from wanda_lightning.common.errors import UserError
from wanda_lightning.data import image_sources, text_sources
from wanda_lightning.hub.upload import refuse_upload

_Row = tuple[bool, str, str]  # whether it applies, to what, and the names of options without meaning there


def refuse_to_prune(options: PruneOptions) -> None:
    """Raise an error for options of `prune`."""
    model, pruning, data, results = options
    pattern, texts = pruning.choices["pattern"], data.evaluation
    contradicts = pruning.pattern not in ("unstructured", pattern)
    _refuse_unused(
        options,
        *_of_kind(model),
        (model.is_image, "an image classifier", "calibration eval_zero_shot" + " evaluation" * bool(texts)),
        (contradicts, f"--pattern {pruning.pattern}", "use_variant prune_granularity"),
        (pruning.name != "wanda", f"the method {pruning.name}", "use_variant"),
        (not data.eval_zero_shot, "pruning without --eval_zero_shot", "tasks_dir"),
        (results.stream, "--stream", "eval_zero_shot"),
        (results.stream and data.calibration == text_sources.SELF, "--stream of a whole model", "calibration"),
        (not results.stream, "pruning without --stream, which uses a GPU if there is one", "device"),
        (pattern != "structured", f"--pattern {pattern}, whose zeros do not fill hidden units", "shrink"),
    )
    _check_data(model.is_image, data.data, texts)
    if not model.is_image and data.calibration != text_sources.SELF:
        text_sources.check_source(data.calibration, "--calibration")
    if results.report is not None:
        check_report_path(results.report)
    _refuse_folder(model, results)
    if not results.stream:  # a run that continues may find its model there
        _refuse_place("save", results.save, results.overwrite, "folder")
    _refuse_place("report", results.report, results.overwrite, "file")


def refuse_to_shrink(model: Model, results: Folder) -> None:
    """Raise an error for options of `shrink`."""
    nowhere = results.save_model is None, "shrinking without --save_model", "stream overwrite"
    _refuse_unused((model, results), *_of_kind(model), nowhere)
    _refuse_folder(model, results)


def refuse_to_evaluate(models: Models, data: Measurements, results: File) -> None:
    """Raise an error for options of `evaluate`."""
    if len({name.startswith(TIMM) for name in models.all}) != 1:
        found = ", ".join(models.all) or "empty"
        raise UserError(f"--model must name language models or image classifiers, but it is {found}.")
    if len(models.checkpoint) not in (0, len(models.model)):
        found = f"it has {len(models.checkpoint)} for {len(models.model)}"
        raise UserError(f"--checkpoint must have one file for each --model, but {found}.")
    _refuse_unused(
        (models, data, results),
        *_of_kind(models),
        (models.is_image, "an image classifier", "evaluation tasks task_limit"),
        (not data.tasks, "an evaluation without --tasks", "tasks_dir task_limit"),
        (results.save is None, "an evaluation without --save", "overwrite"),
    )
    _check_data(models.is_image, data.data, data.evaluation)
    _refuse_place("save", results.save, results.overwrite, "file")


def refuse_to_inspect(model: Model) -> None:
    """Raise an error for options of `inspect`."""
    _refuse_unused((model,), *_of_kind(model))


def _of_kind(models: Model | Models) -> tuple[_Row, ...]:
    for name in () if models.is_image else models.all:
        models.source(name).locate()
    are_local = all(Path(name).expanduser().exists() for name in models.all)
    of_text = "seqlen limit dtype revision trust_remote_code tasks_dir stream"
    return (
        (models.is_image, "an image classifier", of_text),
        (not models.is_image, "a language model", "data checkpoint"),
        (are_local, "a local model", "revision"),
    )


def _refuse_unused(groups: Iterable[Any], *rows: _Row) -> None:
    """Refuse options that would be ignored."""
    given = given_in(*groups)
    for applies, purpose, names in rows:
        unused = [f"--{name}" for name in names.split() if name in given]
        if applies and unused:
            verb, them = ("has", "it") if len(unused) == 1 else ("have", "them")
            raise UserError(f"{', '.join(unused)} {verb} no meaning for {purpose}. Leave {them} out.")


def _check_data(is_image: bool, images: str | None, texts: Collection[str]) -> None:
    """Refuse data that does not exist, and an image classifier without images."""
    if is_image and images is None:
        raise UserError(
            "--data is required for an image classifier: give a folder laid out like ImageNet, cifar10, cifar100 or a "
            "hub id with the classes that the model was trained on, or digits to try the command out."
        )
    if images is not None:
        image_sources.check_source(images)
    for text in () if is_image else texts:
        text_sources.check_source(text, "--evaluation")


def _refuse_place(name: str, path: str | None, overwrite: bool, kind: str) -> None:
    """Refuse a path that cannot be written, in a message that starts with the option."""
    try:
        if path is not None:
            require_writable(path, overwrite, kind)
    except OSError as error:
        raise UserError(f"--{name} {error}") from error


def _refuse_folder(model: Model, results: Folder) -> None:
    """Refuse a folder that cannot be written or that holds the model, and an upload that cannot succeed."""
    folder, hub_id = results.save_model, results.push_to_hub
    if results.stream and folder is None:
        raise UserError("--stream writes each block to --save_model, which is missing. Add it.")
    no_folder = folder is None, "a command without --save_model", "push_to_hub shrink"
    _refuse_unused((results,), no_folder, (hub_id is None, "a command without --push_to_hub", "private"))
    _refuse_place("save_model", folder, results.overwrite or results.stream, "folder" if results.stream else "model")
    path = Path(model.model.removeprefix("timm:local-dir:")).expanduser()
    if folder and path.exists() and resolve_path(path).is_relative_to(resolve_path(folder)):
        raise UserError(f"--save_model {folder} would replace --model {path}. Choose another folder.")
    if hub_id is not None:
        refuse_upload(hub_id, results.private)
