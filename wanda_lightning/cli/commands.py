"""The commands as typed functions, from which cyclopts makes the shell.

Libraries are imported when a command runs, so that help and wrong options do not wait for them.
"""

from __future__ import annotations

from typing import Any

from cyclopts import App, Parameter

from wanda_lightning.cli.options import (
    Data,
    File,
    Folder,
    Measurements,
    Model,
    Models,
    PruneOptions,
    Pruning,
    Results,
    Session,
)
from wanda_lightning.cli.parsing import read_files, shown_default
from wanda_lightning.config import PruningConfig


def _version() -> str:
    from importlib.metadata import version

    return f"wanda_lightning {version('wanda_lightning')}"


app = App(
    name="wanda-lightning",
    help="Prune language models and image classifiers in one shot.",
    help_format="plaintext",
    version=_version,
    default_parameter=Parameter(negative=(), name_transform=lambda name: name, show_default=shown_default),
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
    """Prune a language model or an image classifier, and measure it before and after."""
    from wanda_lightning.cli.refusals import refuse_to_prune

    options = PruneOptions(model, pruning, data, results)
    refuse_to_prune(options)
    config = PruningConfig.from_names(**pruning.choices)  # which imports torch
    from wanda_lightning.cli import pruning as runs

    runs.prune(config, options)


@app.command
def shrink(model: Model, results: Folder = Folder(), session: Session = Session()) -> None:
    """Take out the hidden units that are zero, as prune --pattern structured leaves them, and save the rest.

    Without --save_model, what could be taken out is only shown.
    """
    from wanda_lightning.cli.refusals import refuse_to_shrink

    refuse_to_shrink(model, results)
    from wanda_lightning.cli import pruning as runs

    runs.shrink(model, results)


@app.command
def evaluate(
    models: Models, data: Measurements = Measurements(), results: File = File(), session: Session = Session()
) -> None:
    """Measure models side by side: perplexity and zero-shot tasks, or accuracy on images; and sparsity."""
    from wanda_lightning.cli.refusals import refuse_to_evaluate

    refuse_to_evaluate(models, data, results)
    from wanda_lightning.cli import measuring

    measuring.evaluate(models, data, results)


@app.command
def inspect(model: Model, pruning: Pruning = Pruning(), session: Session = Session()) -> None:
    """Show what prune would prune, what not, and why. No weight is loaded."""
    from wanda_lightning.cli.refusals import refuse_to_inspect

    refuse_to_inspect(model)
    kept, _, of = pruning.pattern.partition(":")
    chosen: dict[str, Any] = {"sparsity": 1 - int(kept) / int(of)} if of else {}  # which inspect does not depend on
    config = PruningConfig.from_names(**pruning.choices | chosen)
    from wanda_lightning.cli import inspecting

    inspecting.inspect(config, model)


LIGHTNING = ("fit", "validate", "test", "predict")


@app.command(name=LIGHTNING)
def _run_lightning() -> None:
    """Run the Lightning Trainer on a YAML recipe (see recipes/): fit --config FILE.yaml.

    Options such as --trainer.max_epochs 3 replace those of the recipe; --help_all lists them, which takes some seconds.
    """
