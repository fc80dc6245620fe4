"""`wanda-lightning fit|validate|test`: recipes."""

import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
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


ONE_OF_FOUR = {"pattern": {"class_path": "wanda_lightning.NM", "init_args": {"n": 1, "m": 4}}, "sparsity": 0.75}


def pruned_as():
    report = json.loads(Path("out/pruning_report.json").read_text())
    return report["config"]["pattern"], report["sparsity"], report["config"]["sparsity"]


def test_validate_a_recipe(recipe, capsys, tmp_path):
    path = recipe(pattern="2:4")
    assert run("validate", "--config", path, "--print_config") == 0
    (callback,) = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"]
    assert (callback["class_path"], callback["init_args"]["pattern"]) == ("wanda_lightning.WandaPrune", "2:4")
    assert callback["init_args"]["keep_batch_norm"] is False  # a default of `PruningConfig.from_names`
    assert not Path("out").exists()
    assert run("validate", "--config", path) == 0
    assert "val_perplexity" in capsys.readouterr().out
    assert pruned_as() == ({"name": "NM", "n": 2, "m": 4}, 0.5, 0.5)
    assert sorted(os.listdir(tmp_path)) == ["out", "recipe.yaml"]


def test_a_recipe_of_choices_within_choices(recipe):
    of_ours = "wanda_lightning.{}".format
    admm = {"class_path": of_ours("ADMM"), "init_args": {"iterations": 2, "rho": [0.2, 0.4]}}
    allocation = {"class_path": of_ours("PerLayer"), "init_args": {"sparsities": {"*.mlp": 0.75}}}
    recovery = {"class_path": of_ours("Reconstruct"), "init_args": {"epochs": 1}}
    path = Path(recipe(allocation=allocation))
    options = yaml.safe_load(path.read_text())
    (callback,) = options["trainer"]["callbacks"]
    callback["class_path"] = of_ours("PruningCallback")
    callback["init_args"] |= {"solver": admm, "recovery": recovery}
    path.write_text(yaml.safe_dump(options))
    assert run("validate", "--config", str(path)) == 0
    report = json.loads(Path("out/pruning_report.json").read_text())
    inner = report["config"]["solver"]
    assert (inner["name"], inner["iterations"], inner["rho"]) == ("ADMM", 2, [0.2, 0.4])
    assert report["config"]["recovery"] == {"name": "Reconstruct", "epochs": 1, "learning_rate": 0.01}
    assert all((layer["sparsity"] == 0.75) == (".mlp." in layer["name"]) for layer in report["layers"])
    assert report["sparsity"] == 0.5


def test_fit_a_recipe(recipe, inputs, capsys):
    checkpoints = ["--trainer.enable_checkpointing", "true", "--trainer.default_root_dir", "root"]
    options = ["--model.init_args.lr", "0.01", "--model.init_args.weight_decay", "0.1"]
    path = recipe(**ONE_OF_FOUR)
    assert run("fit", "--config", path, *checkpoints, *options) == 0
    assert pruned_as() == ({"name": "NM", "n": 1, "m": 4}, 0.75, 0.75)
    (checkpoint,) = Path("root/checkpoints").iterdir()
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    dense = load_file(inputs / "llama/model.safetensors")
    for name, weight in dense.items():
        trained = weights[f"model.{name}"]
        assert not torch.equal(trained, weight)
        if name.endswith("proj.weight"):
            assert ((trained != 0).reshape(-1, 4).sum(dim=1) == 1).all()
    capsys.readouterr()
    assert run("test", "--config", path, *checkpoints, "--ckpt_path", checkpoint) == 0
    assert "test_perplexity" in "".join(capsys.readouterr())


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


def test_2_to_4_needs_no_quotes(recipe, capsys):
    path = Path(recipe(pattern="2:4"))
    path.write_text(path.read_text().replace("'2:4'", "2:4"))
    assert run("validate", "--config", str(path), "--print_config") == 0
    (callback,) = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"]
    assert callback["init_args"]["pattern"] == "2:4"
