"""The commands as typed functions, from which cyclopts makes the shell, and what they refuse before anything is loaded.

Libraries are imported when a command runs, so that help and wrong options do not wait for them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cyclopts import App, Parameter

import wanda_lightning
from wanda_lightning.cli import options
from wanda_lightning.cli.options import given_in, read_files, values_of
from wanda_lightning.common.errors import UserError
from wanda_lightning.config import PruningConfig


def _shown_default(value: Any) -> str | None:
    """Return a default as it is typed; None for what help does not show."""
    return ",".join(value) if isinstance(value, tuple) and value else str(value) if value else None


app = App(
    name="wanda-lightning",
    help="Prune language models and image classifiers in one shot.",
    help_format="plaintext",
    version=lambda: f"wanda_lightning {wanda_lightning.__version__}",
    default_parameter=Parameter(
        negative=(), name_transform=lambda name: name, show_default=_shown_default
    ),
    end_of_options_delimiter="",
    config=read_files,
)


@app.command
def prune(
    model: options.Model,
    pruning: options.Pruning = options.Pruning(),
    data: options.Data = options.Data(),
    results: options.Results = options.Results(),
    session: options.Session = options.Session(),
) -> None:
    """Prune a language model or an image classifier, and measure it before and after."""
    _refuse(model, pruning, data, results)
    config = PruningConfig.from_names(**pruning.choices)  # which imports torch
    from wanda_lightning.cli import pruning as runs

    runs.prune(config, (model, pruning, data, results))


@app.command
def shrink(
    model: options.Model,
    results: options.Folder = options.Folder(),
    session: options.Session = options.Session(),
) -> None:
    """Take out the hidden units that are zero, as prune --pattern structured leaves them, and save the rest.

    Without --save_model, what could be taken out is only shown.
    """
    _refuse(model, results)
    from wanda_lightning.cli import pruning as runs

    runs.shrink(model, results)


@app.command
def evaluate(
    models: options.Models,
    data: options.Measurements = options.Measurements(),
    results: options.File = options.File(),
    session: options.Session = options.Session(),
) -> None:
    """Measure models side by side: perplexity and zero-shot tasks, or accuracy on images; and sparsity."""
    _refuse(models, data, results)
    if len(models.checkpoint) not in (0, len(models.model)):
        raise UserError(
            f"--checkpoint must have one file for each --model, but it has {len(models.checkpoint)}."
        )
    from wanda_lightning.cli import measuring

    measuring.evaluate(models, data, results)


@app.command
def inspect(
    model: options.Model,
    pruning: options.Pruning = options.Pruning(),
    session: options.Session = options.Session(),
) -> None:
    """Show what prune would prune, what not, and why. No weight is loaded."""
    _refuse(model)
    config = PruningConfig.from_names(**pruning.choices)
    from wanda_lightning.cli import measuring

    measuring.inspect(config, model)


LIGHTNING = ("fit", "validate", "test", "predict")


@app.command(name=LIGHTNING)
def _run_lightning() -> None:
    """Run the Lightning Trainer on a YAML recipe (see recipes/): fit --config FILE.yaml.

    Options such as --trainer.max_epochs 3 replace those of the recipe; --help_all lists them, which takes some seconds.
    """


def _refuse(models: options.Model, *groups: Any) -> None:
    """Refuse options that would be ignored, and places that cannot be written.

    Contradictions between choices are refused by `PruningConfig`, and unknown data where options are read.
    """
    from wanda_lightning.common.atomic_write import require_writable, resolve_path
    from wanda_lightning.common.checks import check_report_path
    from wanda_lightning.data import image_sources
    from wanda_lightning.hub.upload import refuse_upload

    on: Any = (values := values_of(models, *groups)).get
    given = given_in(models, *groups)
    pattern = on("pattern", "unstructured")
    stream = bool(on("stream"))
    of_text = "seqlen limit dtype revision trust_remote_code tasks_dir tasks task_limit stream calibration"
    for applies, purpose, names in (
        (
            models.is_image,
            "an image classifier",
            f"{of_text} eval_zero_shot" + " evaluation" * bool(on("evaluation")),
        ),
        (not models.is_image, "a language model", "data checkpoint"),
        (all(Path(name).expanduser().exists() for name in models.all), "a local model", "revision"),
        (pattern != "unstructured", f"--pattern {pattern}", "use_variant prune_granularity"),
        (
            not on("tasks") and not on("eval_zero_shot"),
            "a command without tasks",
            "tasks_dir task_limit",
        ),
        (not on("push_to_hub"), "a command without --push_to_hub", "private"),
        (not on("save_model"), "a command without --save_model", "push_to_hub shrink stream"),
        (on("pattern") not in (None, "structured"), f"--pattern {pattern}", "shrink"),
        (stream, "--stream", "eval_zero_shot" + " calibration" * (on("calibration") == "self")),
        (not stream, "pruning without --stream, which uses a GPU if there is one", "device"),
        (
            not (on("save") or on("save_model") or on("report")),
            "a command that writes nothing",
            "overwrite",
        ),
    ):
        unused = [f"--{name}" for name in names.split() if name in given]
        if applies and unused:
            raise UserError(
                f"{', '.join(unused)} must be left out for {purpose}, or it would be ignored."
            )
    if len({name.startswith("timm:") for name in models.all}) != 1:
        raise UserError("--model must name language models, or image classifiers.")
    for name in () if models.is_image else models.all:
        models.source(name).locate()  # refuses a wrong path before libraries are imported
    if models.is_image and "data" in values:
        image_sources.check_source(on("data") or "")
    folder = on("save_model")
    model = Path(str(models.model).removeprefix("timm:local-dir:")).expanduser()
    if on("report"):
        check_report_path(on("report"))
        require_writable(on("report"), on("overwrite"), "file")
    if on("save") and not stream:  # a run that continues may find its model there
        require_writable(
            on("save"), on("overwrite"), "file" if isinstance(models, options.Models) else "folder"
        )
    if folder:
        require_writable(folder, on("overwrite") or stream, "folder" if stream else "model")
    if folder and model.exists() and resolve_path(model).is_relative_to(resolve_path(folder)):
        raise UserError(
            f"--save_model {folder} would replace --model {model}. Choose another folder."
        )
    if on("push_to_hub"):
        refuse_upload(on("push_to_hub"), on("private"))
