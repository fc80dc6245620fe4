"""What every recipe promises: its first lines, and that it runs, here with a tiny model, few data and two steps."""

import ast
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from support.cli import IGNORED_WARNINGS, run
from support.embedding import SENTENCES, load, save_pairs, spearman_by_hand
from support.layers import assert_same
from support.mlps import relu_mlp
from support.pairwise import with_nightly
from support.recipes import script
from support.reports import read_json
from timm.models import save_for_hf
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)
from transformers import AutoModelForCausalLM

from wanda_lightning import ShrinkCallback, prune
from wanda_lightning.cli import lightning
from wanda_lightning.models import find_layers

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*/*.yaml"))
SCRIPTS = sorted((ROOT / "recipes").glob("*/*.py"))
COLLECTION = sorted((ROOT / "recipes").glob("collection.*"))


def name(path):
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", [*RECIPES, *SCRIPTS, *COLLECTION], ids=name)
def test_a_recipe_opens_with_command_cost_and_result(path):
    text = path.read_text()
    if path.suffix == ".py":
        head = ast.get_docstring(ast.parse(text))
    else:
        head = "\n".join(line for line in text.splitlines() if line.startswith("#"))
        assert "# Cost" in head
    assert name(path) in head
    assert re.search("(?i)result", head)


TEXT = "--model.model={inputs}/llama --data.calibration={inputs}/long.txt --data.evaluation={inputs}/other.txt"
TEXT += " --data.num_samples=4"
PRUNE = "--model={inputs}/llama --calibration={inputs}/long.txt --evaluation={inputs}/other.txt --seqlen=16"
PRUNE += " --num_samples=4"
TRAIN = f"{TEXT} --data.seqlen=16 --data.train_samples=2"
ENCODER = "--model.model={encoder} --data.calibration=sentences.txt --data.evaluation=pairs.csv"
# Options that make a recipe fast.
SMALLER = {
    "wanda_2to4": PRUNE,
    "validate_wanda": f"{TEXT} --data.seqlen=16",
    "prune_then_distill": TRAIN,
    "prune_then_finetune": TRAIN,
    "prune_then_lora": TRAIN,
    "smaller": TRAIN,
    "gradual": f"{TEXT} --data.seqlen=8 --data.train_samples=61",
    "smaller_encoder": f"{ENCODER} --data.train_samples=8",
    "encoder_on_pairs": f"{ENCODER} --data.train=pairs.csv",
    "convnext_finetune": "--model.model=local-dir:convnext --data.data={inputs}/images --data.num_workers=0"
    " --data.image_size=32",
    "digits_vit": "--trainer.max_epochs=1 --trainer.limit_train_batches=2 --trainer.limit_val_batches=1",
    "digits_vit_smaller": "--trainer.max_epochs=6 --data.batch_size=20 --trainer.limit_val_batches=1",
    "digits_vit_gradual": "--trainer.max_epochs=4 --data.batch_size=20 --trainer.limit_val_batches=1",
}
SLOW = ("digits_vit_gradual", "digits_vit_smaller", "gradual")
RUN = [
    pytest.param(path, id=path.stem, marks=[pytest.mark.nightly] if path.stem in SLOW else [])
    for path in RECIPES
    if path.parent.name != "paper"
]


def choices_of(path):
    """The sparsity and the pattern of a recipe, or None if it shrinks; and the folder in which it saves a model."""
    content = yaml.safe_load(path.read_text())
    if "save_model" in content:  # of the command prune
        return content["sparsity"], content["pattern"], content["save_model"]
    options = {}
    for callback in content["trainer"]["callbacks"]:
        options |= callback.get("init_args", {})
    return options.get("sparsity"), options.get("pattern", "unstructured"), options.get("folder")


def saved_model(folder):
    if "architecture" in read_json(Path(folder, "config.json")):
        return timm.create_model(f"local-dir:{folder}", pretrained=True)
    if Path(folder, "modules.json").is_file():
        return load(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def weights_of(model):
    return [model.get_submodule(layer.name).weight for layer in find_layers(model).layers]


@pytest.mark.filterwarnings("ignore")  # there are fewer data than the recipe asks for
@pytest.mark.parametrize("path", RUN)
def test_a_recipe_runs(path, inputs, tiny_folder, monkeypatch, request):
    if path.stem == "digits_vit":
        request.getfixturevalue("few_digits")
    runs = []
    cli = lightning._CLI
    monkeypatch.setattr(lightning, "_CLI", lambda **options: runs.append(cli(**options)))
    save_for_hf(timm.create_model("test_convnext"), "convnext", safe_serialization=True)
    Path("sentences.txt").write_text("\n\n".join(SENTENCES))
    save_pairs(Path("pairs.csv"))
    first = next(line for line in path.read_text().splitlines() if line.startswith("#   "))
    program, command, option, _ = shlex.split(first.removeprefix("#"))
    assert (program, option) == ("wanda-lightning", "--config")
    options = SMALLER[path.stem].format(inputs=inputs, encoder=tiny_folder).split()
    assert run(command, option, path, *options) == 0

    sparsity, pattern, folder = choices_of(path)
    model = saved_model(folder) if folder else runs[0].model.model
    weights = weights_of(model)
    assert len(weights) >= 12
    if sparsity is None:
        check_smaller(model, runs[0])
        return
    for weight in weights:
        zeros = weight.flatten(1) == 0
        if pattern == "2:4":
            zeros = zeros.view(-1, 4)
        assert (zeros.sum(1) == int(sparsity * zeros.shape[1])).all()


def check_smaller(model, run):
    """What is saved is the trained model, and what has left is what the report says."""
    assert_same(weights_of(model), weights_of(run.model.model))
    (report,) = [c.report for c in run.trainer.callbacks if isinstance(c, ShrinkCallback)]
    assert report.layers
    for layer in report.layers:
        assert 0 < model.get_submodule(layer.name).weight.numel() == layer.size - layer.zeros


speed_2to4 = script("llm/speed_2to4")


def test_2to4_weights_have_a_shape_that_fits():
    shapes = ((16, 48), (16, 48), (16, 24), (24, 16))
    dense, *layers = [torch.nn.Linear(columns, rows) for rows, columns in shapes]
    for layer in layers:
        layer.weight.data[:, ::2] = 0
    assert speed_2to4.layers_2to4(torch.nn.Sequential(dense, *layers)) == layers[:1]


def test_pytorch_compresses_weights_of_this_shape():
    constraints = torch.sparse.SparseSemiStructuredTensorCUSPARSELT._DTYPE_SHAPE_CONSTRAINTS[
        torch.float16
    ]
    smallest = (constraints.sparse_min_rows, constraints.sparse_min_cols)
    assert smallest == (speed_2to4.MULTIPLE_OF, speed_2to4.MULTIPLE_OF), (
        "PyTorch takes 2:4 weights of other shapes: change MULTIPLE_OF in recipes/llm/speed_2to4.py and docs/speed.md"
    )


def test_pytorchs_format_for_2to4_holds_every_pruned_weight():
    """Its kernels need a GPU, but what converts to CUTLASS's format and back is written in PyTorch."""
    model = relu_mlp(64, 32, 8)
    prune(model, [torch.randn(64, 64)], 0.5, pattern="2:4", progress=False)
    (layer,) = speed_2to4.layers_2to4(model)
    values, places = sparse_semi_structured_from_dense_cutlass(layer.weight.half())
    assert values.numel() == layer.weight.numel() / 2
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(values, places), layer.weight.half())


def test_2to4_weights_without_a_gpu_are_refused_before_the_model_is_read(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["speed_2to4", "--model", "missing"])
    with pytest.raises(
        SystemExit,
        match=r"^speed_2to4\.py needs an NVIDIA GPU of .* 8\.0 .*, but PyTorch .* finds no GPU",
    ):
        speed_2to4.main()


@IGNORED_WARNINGS
def test_a_small_mixture_is_trained_and_loses_experts_from_disk(monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda _: ROOT / "wanda_lightning/core")
    monkeypatch.setattr(
        sys, "argv", ["small_mixture", "--output", "mixture", "--steps", "1", "--vocabulary", "300"]
    )
    recipe = script("llm/small_mixture")
    monkeypatch.setattr(recipe, "SEQLEN", 16)
    recipe.main()
    texts = "--calibration mixture_text/training.txt --evaluation mixture_text/heldout.txt --seqlen 16 --nsamples 4"
    texts += " --limit 4"
    options = f"--model mixture {texts} --stream --experts 0.25 --save_model small"
    assert run("shrink", *options.split()) == 0
    assert AutoModelForCausalLM.from_pretrained("small").config.num_experts == 12


@pytest.mark.filterwarnings("ignore")
def test_a_smaller_model_is_trained_longer_and_a_lost_step_repeated(inputs, monkeypatch):
    options = f"--model {inputs}/llama --output out --tokens 1 --precision 32-true"
    monkeypatch.setattr(sys, "argv", ["recipe", f"{inputs}/long.txt", *options.split()])
    recipe = script("llm/smaller_longer")
    monkeypatch.setattr(recipe, "SEQLEN", 128)
    monkeypatch.setattr(recipe, "WRITTEN", 64)
    monkeypatch.setattr(recipe, "TOGETHER", 8)
    for name in ("first", "again"):
        recipe.main()
        Path("out/model").rename(f"out/{name}")
    first, again, pruned = (
        AutoModelForCausalLM.from_pretrained(f"out/{name}", trust_remote_code=True).state_dict()
        for name in ("first", "again", "pruned")
    )
    assert_same(first, again)
    assert not any(torch.equal(weight, pruned[name]) for name, weight in first.items())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("with_pairs", with_nightly([True], [False]))
def test_a_smaller_encoder_is_measured_and_saved(
    with_pairs, tiny_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    Path("sentences.txt").write_text("\n\n".join(SENTENCES))
    options = f"--model {tiny_folder} --calibration sentences.txt --num_samples 40 --rounds 2"
    if with_pairs:
        options += f" --pairs {save_pairs(Path('pairs.csv'))}"
    monkeypatch.setattr(sys, "argv", ["demo", *options.split()])
    runpy.run_path(str(ROOT / "recipes/embedding/demo.py"), run_name="__main__")

    model = load("out/embedding")
    assert model[0].auto_model.config.intermediate_size == 16
    assert Path("out/embedding.html").is_file()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    (dense,) = [row for row in rows if row[1:2] == ["dense"]]
    score = spearman_by_hand(load(tiny_folder))
    assert f"{score if with_pairs else 100:.2f}" in dense
