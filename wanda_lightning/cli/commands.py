"""The commands as typed functions, from which cyclopts makes the shell, and what they refuse before anything is loaded.

Libraries are imported when a command runs, so that help and wrong options do not wait for them.
"""

from collections.abc import Iterator
from pathlib import Path

from cyclopts import App, Parameter

import wanda_lightning
from wanda_lightning.cli.options import (
    Data,
    File,
    JobOptions,
    Measurements,
    Model,
    Models,
    Pruning,
    Results,
    Session,
    Shrinking,
    given_in,
    read_files,
    values_of,
)
from wanda_lightning.common.aliases import Kwargs
from wanda_lightning.common.errors import UserError
from wanda_lightning.config import PruningConfig
from wanda_lightning.shrink_config import ShrinkConfig


def _shown_default(value: object) -> str | None:
    """Return a default as it is typed; None for what help does not show."""
    if not value:
        return None
    return ",".join(value) if isinstance(value, tuple) else str(value)


app = App(
    name="wanda-lightning",
    help="Prune language models, embedding models and image classifiers in one shot.",
    help_flags=("--help", "-h", "--help_all"),
    help_format="plaintext",
    help_epilogue="COMMAND --help_all also lists the rare options of a command.",
    version=lambda: f"wanda_lightning {wanda_lightning.__version__}",
    default_parameter=Parameter(
        negative=(), name_transform=lambda name: name, show_default=_shown_default
    ),
    end_of_options_delimiter="",
    config=read_files,
)


@app.command
def prune(
    model: Model,
    pruning: Pruning = Pruning(),
    data: Data = Data(),
    results: Results = Results(),
    session: Session = Session(),
) -> None:
    """Prune a language model, an embedding model or an image classifier, and measure it before and after."""
    refuse(model, pruning, data, results)
    config = PruningConfig(**pruning.choices)  # which imports torch
    from wanda_lightning.cli.run_job import run_job

    run_job((config,), JobOptions(model, pruning, data, results))


@app.command
def shrink(
    model: Model,
    shrinking: Shrinking = Shrinking(),
    data: Data = Data(),
    results: Results = Results(),
    session: Session = Session(),
) -> None:
    """Take hidden units or experts out of a model, and measure it before and after.

    Without --units, --experts and --max_size, the units leave that are zero; nothing is measured then.
    """
    refuse(model, shrinking, data, results)
    config = ShrinkConfig(**vars(shrinking))  # which imports torch
    if config.parts:
        from wanda_lightning.cli.run_job import run_job

        run_job(config.parts, JobOptions(model, shrinking, data, results))
    else:
        from wanda_lightning.cli import shrink_command

        shrink_command.take_out_zeros(model, results)


@app.command
def evaluate(
    models: Models,
    data: Measurements = Measurements(),
    results: File = File(),
    session: Session = Session(),
) -> None:
    """Measure models side by side: perplexity and zero-shot tasks, pairs of sentences, or accuracy; and sparsity."""
    refuse(models, data, results)
    if len(models.checkpoint) not in (0, len(models.model)):
        raise UserError(
            f"--checkpoint must have one file for each --model, but it has {len(models.checkpoint)}."
        )
    from wanda_lightning.cli import evaluate_command

    evaluate_command.evaluate(models, data, results)


@app.command
def inspect(
    model: Model,
    pruning: Pruning = Pruning(),
    session: Session = Session(),
) -> None:
    """Show what prune would prune, what not, and why. No weight is loaded."""
    refuse(model)
    config = PruningConfig(**pruning.choices)
    from wanda_lightning.cli import inspect_command

    inspect_command.inspect(config, model)


LIGHTNING = ("fit", "validate", "test", "predict")


@app.command(name=LIGHTNING)
def _run_lightning() -> None:
    """Run the Lightning Trainer on a YAML recipe (see recipes/): fit --config FILE.yaml.

    Options such as --trainer.max_epochs 3 replace those of the recipe; --help_all lists them, which takes some seconds.
    """


def refuse(models: Model, *groups: object) -> None:
    """Refuse options that would be ignored, models and images that do not exist, and places that cannot be written.

    Contradictions between choices are refused by `PruningConfig`, and unknown texts where options are read.
    """
    values = values_of(models, *groups)
    given = given_in(models, *groups)
    for case, names in _ignored(models, values):
        unused = [f"--{name}" for name in names.split() if name in given]
        if unused:
            raise UserError(
                f"{', '.join(unused)} must be left out for {case}, or it would be ignored."
            )
    _refuse_missing(models, values)
    _refuse_places(models, values)


# What `shrink` without an amount does not read.
_UNREAD = (
    "calibration num_samples packing seed data checkpoint evaluation limit seqlen batch_size eval_zero_shot "
    "save report device"
)


def _ignored(models: Model, values: Kwargs) -> Iterator[tuple[str, str]]:
    """Yield the cases that apply, in words, each with the options that would be ignored."""
    yield from _ignored_by_kind(models, values)
    if all(models.source(name).path.exists() for name in models.all):
        yield "a local model", "revision"

    pattern = values.get("pattern", "unstructured")
    if pattern != "unstructured":
        yield f"--pattern {pattern}", "use_variant prune_granularity"
    if not (values.get("tasks") or values.get("eval_zero_shot")):
        yield "a command without tasks", "tasks_dir task_limit num_fewshot apply_chat_template"
    if not values.get("save_model"):
        yield "a command without --save_model", "stream"
    if _takes_out_zeros(values):
        yield "shrink without --units, --experts and --max_size", _UNREAD
    if values.get("stream"):
        yield "--stream", "eval_zero_shot"
        if "self" in values.get("calibration", ()):
            yield "--stream", "calibration"
    else:
        yield "a run without --stream, which uses a GPU if there is one", "device"
    if not any(values.get(name) for name in ("save", "save_model", "report")):
        yield "a command that writes nothing", "overwrite"


def _takes_out_zeros(values: Kwargs) -> bool:
    """Whether this is `shrink` without an amount, which reads no data."""
    return all(values.get(name, "") is None for name in ("units", "experts", "max_size"))


def _ignored_by_kind(models: Model, values: Kwargs) -> Iterator[tuple[str, str]]:
    if models.is_image:
        yield (
            "an image classifier",
            "seqlen limit dtype revision trust_remote_code tasks_dir tasks stream calibration packing eval_zero_shot",
        )
        if values.get("evaluation"):  # an empty one says that nothing is measured
            yield "an image classifier", "evaluation"
    elif models.is_embedding:
        yield (
            "an embedding model",
            "data checkpoint seqlen dtype tasks_dir tasks stream packing eval_zero_shot",
        )
        if "self" in values.get("calibration", ()):
            yield "an embedding model", "calibration"
    else:
        yield "a language model", "data checkpoint"


def _refuse_missing(models: Model, values: Kwargs) -> None:
    """Refuse a wrong path of a model or of images before libraries are imported."""
    if len({name.startswith("timm:") for name in models.all}) != 1:
        raise UserError("--model must name language models, or image classifiers.")
    if not models.is_image:
        for name in models.all:
            models.source(name).locate()
    elif "data" in values and not _takes_out_zeros(values):
        from wanda_lightning.data.image_sources import check_source

        check_source(values["data"] or "")


def _refuse_places(models: Model, values: Kwargs) -> None:
    """Refuse files and folders that cannot be written or must not be replaced."""
    from wanda_lightning.common.atomic_write import require_writable, resolve_path
    from wanda_lightning.common.checks import check_report_path

    overwrite = values.get("overwrite", False)
    stream = values.get("stream", False)
    report = values.get("report")
    if report:
        check_report_path(report)
        require_writable(report, overwrite, "file")

    save = values.get("save")
    # A streamed run that continues may find its model in this folder, so `prune` itself checks it.
    if save and not stream:
        kind = "file" if isinstance(models, Models) else "folder"
        require_writable(save, overwrite, kind)

    folder = values.get("save_model")
    if folder:
        require_writable(folder, overwrite or stream, "folder" if stream else "model")
        model = Path(models.model.removeprefix("timm:local-dir:")).expanduser()
        if model.exists() and resolve_path(model).is_relative_to(resolve_path(folder)):
            raise UserError(
                f"--save_model {folder} would replace --model {model}. Choose another folder."
            )
