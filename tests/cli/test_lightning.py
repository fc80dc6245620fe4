"""`wanda-lightning fit|validate|test`: recipes. All recipes of the repository run in tests/recipes."""

import os
from pathlib import Path

import pytest
import yaml
from support.cli import IGNORED_WARNINGS, SEQLEN, run

from wanda_lightning import PruningReport

pytestmark = IGNORED_WARNINGS
RECIPE = """
model: {class_path: wanda_lightning.CausalLMModule, init_args: {model: INPUTS/llama}}
data:
  class_path: wanda_lightning.TextDataModule
  init_args: {calibration: INPUTS/long.txt, evaluation: INPUTS/other.txt, seqlen: SEQLEN, num_samples: 6, limit: 6}
trainer:
  accelerator: cpu
  logger: false
  enable_progress_bar: false
  callbacks:
  - class_path: wanda_lightning.WandaPrune
    init_args: {num_samples: 6, report_dir: out, sparsity: 0.5, pattern: 2:4, skip: []}
"""


@pytest.fixture
def recipe(inputs):
    """A recipe in which 2:4 has no quotes."""
    Path("recipe.yaml").write_text(RECIPE.replace("INPUTS", str(inputs)).replace("SEQLEN", str(SEQLEN)))
    return Path("recipe.yaml")


def test_validate_a_recipe(recipe, capsys, tmp_path):
    assert run("validate", "--config", recipe, "--print_config") == 0
    (callback,) = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"]
    assert (callback["class_path"], callback["init_args"]["pattern"]) == ("wanda_lightning.WandaPrune", "2:4")
    assert callback["init_args"]["keep_batch_norm"] is False  # a default of `PruningConfig.from_names`
    assert run("validate", "--config", recipe) == 0
    assert "val_perplexity" in capsys.readouterr().out
    report = PruningReport.load("out")
    assert (report.config["pattern"], report.sparsity) == ({"name": "NM", "n": 2, "m": 4}, 0.5)
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
    recipe.write_text(recipe.read_text().replace(*change))
    refused("validate", "--config", recipe, message=message)


OWN = """
from dataclasses import dataclass
from wanda_lightning import Criterion

@dataclass(frozen=True)
class Power(Criterion):
    needs = frozenset({"square_sum"})
    power: float = 0.5

    def __call__(self, weight, inputs):
        return weight.float().abs() * inputs.norm() ** self.power
"""


def test_a_recipe_with_a_criterion_of_a_file_beside_it(recipe, monkeypatch, tmp_path):
    Path("my_method.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    given = "pattern: 2:4, criterion: {class_path: my_method.Power, init_args: {power: 0.3}}"
    recipe.write_text(recipe.read_text().replace("pattern: 2:4", given))
    assert run("validate", "--config", recipe) == 0
    assert PruningReport.load("out").config["criterion"] == {"name": "Power", "power": 0.3}
