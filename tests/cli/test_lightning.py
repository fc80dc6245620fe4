"""`wanda-lightning fit|validate|test`: recipes. All recipes of the repository run in tests/recipes."""

import inspect
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from support.cli import IGNORED_WARNINGS, SEQLEN, run
from support.layers import assert_same
from user_of_types import Power

from wanda_lightning import CausalLMModule, ImageClassifierModule, PruningReport

pytestmark = IGNORED_WARNINGS
TRAINER = """
trainer:
  accelerator: cpu
  logger: false
  enable_progress_bar: false
  callbacks:
  - class_path: wanda_lightning.WandaPrune
    init_args: {num_samples: 6, report_dir: out, sparsity: 0.5, pattern: 2:4, skip: []}
"""
LANGUAGE = """
model: {class_path: wanda_lightning.CausalLMModule, init_args: {model: INPUTS/llama}}
data:
  class_path: wanda_lightning.TextDataModule
  init_args: {calibration: INPUTS/long.txt, evaluation: INPUTS/other.txt, seqlen: SEQLEN, num_samples: 6, limit: 6}
"""
IMAGES = """
model:
  class_path: wanda_lightning.ImageClassifierModule
  init_args: {model: test_vit, pretrained: false, num_classes: 4}
data: {class_path: wanda_lightning.ImageDataModule, init_args: {data: INPUTS/images, num_samples: 6, batch_size: 6}}
"""


@pytest.fixture
def write(inputs):
    """Writes the parts of a recipe into a file."""

    def write(*parts):
        Path("recipe.yaml").write_text(
            "".join(parts).replace("INPUTS", str(inputs)).replace("SEQLEN", str(SEQLEN))
        )
        return Path("recipe.yaml")

    return write


@pytest.fixture
def recipe(write):
    """A recipe in which 2:4 has no quotes."""
    return write(LANGUAGE, TRAINER)


def test_a_recipe_is_printed_with_the_defaults_of_the_choices(recipe, capsys):
    assert run("validate", "--config", recipe, "--print_config") == 0
    (callback,) = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"]
    assert callback["class_path"] == "wanda_lightning.WandaPrune"
    assert callback["init_args"]["pattern"] == "2:4"
    assert callback["init_args"]["keep_batch_norm"] is False  # from `PruningConfig`


def test_validate_a_recipe_with_a_criterion_of_a_file_beside_it(
    recipe, capsys, monkeypatch, tmp_path
):
    shutil.copy(inspect.getsourcefile(Power), "my_method.py")
    monkeypatch.syspath_prepend(tmp_path)
    criterion = "criterion: {class_path: my_method.Power, init_args: {power: 0.3}}"
    text = recipe.read_text().replace("WandaPrune", "PruningCallback")
    recipe.write_text(text.replace("pattern: 2:4", f"pattern: 2:4, {criterion}"))
    assert run("validate", "--config", recipe) == 0
    assert "val_perplexity" in capsys.readouterr().out
    report = PruningReport.load("out")
    assert report.config["pattern"] == {"name": "NM", "n": 2, "m": 4}
    assert report.config["criterion"] == {"name": "Power", "power": 0.3}
    assert report.sparsity == 0.5
    assert {*os.listdir(tmp_path)} - {"__pycache__"} == {"out", "my_method.py", "recipe.yaml"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("0.5", "0.7"), "sparsity must be 0.5 for the pattern 2:4, but it is 0.7"),
        (("skip: []", "skip: [nothing]"), "skip='nothing' matches no matrix"),
        ((".WandaPrune", ".WandaPrun"), "WandaPrun"),
        (
            ("\nmodel:", "\nseed_everything: 4294967296\nmodel:"),
            "seed_everything must be a whole number of at least 0",
        ),
    ],
)
def test_a_recipe_is_refused(recipe, refused, change, message):
    recipe.write_text(recipe.read_text().replace(*change))
    refused("validate", "--config", recipe, message=message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "required: fit.model"),
        (["--model", "x.gguf"], "Problem with given class_path 'x.gguf'"),
        (["--config", "gone.yaml"], "File does not exist: "),
        (["--trainer.no_such_option", "3"], "no_such_option"),
    ],
)
def test_wrong_options_are_refused_without_the_usage(refused, options, message):
    error = refused("fit", *options, message=message)
    assert error.endswith("such as --model.model NAME; --help_all lists them.\n")
    assert "[--trainer.accelerator" not in error


MORE_CALLBACKS = """
  - class_path: wanda_lightning.BestAfterPruning
    init_args: {monitor: MONITOR, dirpath: best, save_last: true}
  - class_path: wanda_lightning.DistillFromDense
"""


# "... exists and is not empty": the run that goes on writes there again.
@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize(
    ("model", "module", "monitor"),
    [
        (LANGUAGE, CausalLMModule, "val_perplexity"),
        (IMAGES, ImageClassifierModule, "val_accuracy"),
    ],
)
def test_checkpoints_of_fit_are_loaded(write, model, module, monitor):
    """Lightning refuses a checkpoint that names classes or functions it does not trust."""
    recipe = write(model, TRAINER, MORE_CALLBACKS.replace("MONITOR", monitor))
    assert run("fit", "--config", recipe, "--trainer.max_epochs", 1) == 0
    saved = torch.load("best/last.ckpt", weights_only=True)
    assert saved["hyper_parameters"]["_class_path"] == f"wanda_lightning.{module.__name__}"
    assert_same(module.load_from_checkpoint("best/last.ckpt").state_dict(), saved["state_dict"])

    goes_on = ["--config", recipe, "--ckpt_path", "best/last.ckpt"]
    assert run("validate", *goes_on) == 0
    assert run("fit", *goes_on, "--trainer.max_epochs", 2) == 0
    assert torch.load("best/last.ckpt", weights_only=True)["epoch"] == 1
