"""`wanda-lightning fit|validate|test`: recipes."""

import json
import os
from pathlib import Path

import pytest
import yaml
from support.cli import IGNORED_WARNINGS, SEQLEN, run

pytestmark = IGNORED_WARNINGS


RECIPE = """
model: {class_path: wanda_lightning.CausalLMModule, init_args: {model: INPUTS/llama}}
data:
  class_path: wanda_lightning.TextDataModule
  init_args: {calibration: INPUTS/long.txt, evaluation: INPUTS/other.txt, seqlen: SEQLEN, num_samples: 6, limit: 6}
trainer:
  accelerator: cpu
  devices: 1
  max_epochs: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  callbacks: [{class_path: wanda_lightning.WandaPrune, init_args: {num_samples: 6, report_dir: out}}]
"""


@pytest.fixture
def recipe(inputs):
    """Writes a recipe of LightningCLI and returns its path."""

    def write(**pruning):
        options = yaml.safe_load(RECIPE.replace("INPUTS", str(inputs)).replace("SEQLEN", str(SEQLEN)))
        options["trainer"]["callbacks"][0]["init_args"] |= pruning
        Path("recipe.yaml").write_text(yaml.safe_dump(options))
        return "recipe.yaml"

    return write


def test_validate_a_recipe(recipe, capsys, tmp_path):
    path = Path(recipe(pattern="2:4"))
    path.write_text(path.read_text().replace("'2:4'", "2:4"))  # needs no quotes
    assert run("validate", "--config", path, "--print_config") == 0
    (callback,) = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"]
    assert (callback["class_path"], callback["init_args"]["pattern"]) == ("wanda_lightning.WandaPrune", "2:4")
    assert callback["init_args"]["keep_batch_norm"] is False  # a default of `PruningConfig.from_names`
    assert run("validate", "--config", path) == 0
    assert "val_perplexity" in capsys.readouterr().out
    report = json.loads(Path("out/pruning_report.json").read_text())
    assert (report["config"]["pattern"], report["sparsity"]) == ({"name": "NM", "n": 2, "m": 4}, 0.5)
    assert sorted(os.listdir(tmp_path)) == ["out", "recipe.yaml"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("0.5", "0.7"), "sparsity must be 0.5 for the pattern 2:4, but it is 0.7"),
        (("skip: []", "skip: [nothing]"), "skip='nothing' matches no matrix"),
        ((".WandaPrune", ".WandaPrun"), "WandaPrun"),
    ],
)
def test_a_recipe_is_refused(recipe, refused, change, message):
    path = Path(recipe(pattern="2:4", sparsity=0.5, skip=[]))
    path.write_text(path.read_text().replace(*change))
    refused("validate", "--config", str(path), message=message)
