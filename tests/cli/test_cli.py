"""The command line: the reference's flags, every refusal, recipes; what it writes is measured again by hand."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import transformers
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from support.gguf import write_gguf
from support.zoo import ZOO, save_llama_of_bytes
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from wanda_lightning import CausalLMModule, PruningReport
from wanda_lightning.cli import main
from wanda_lightning.models import find_layers

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # they would only slow down these tests
    pytest.mark.filterwarnings("ignore:.*tells .* apart"),  # tiny classifiers are made without regard to the images
    pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning"),  # a log of three steps
]

RECIPES = Path(__file__).parents[2] / "recipes"
COMMANDS = ["prune", "finetune", "evaluate", "inspect", "fit", "validate", "test", "predict"]
SEQLEN = 32


@pytest.fixture(autouse=True)
def shell(tmp_path, monkeypatch):
    """An empty working directory and no network; what a command changes in its process is put back."""
    import datasets
    import huggingface_hub.constants
    from lightning.pytorch import _logger

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # read when it was imported
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning 2.6 under jsonargparse 4.53
    monkeypatch.setattr(sys, "argv", ["wanda-lightning"])  # LightningCLI warns where there are two command lines
    monkeypatch.chdir(tmp_path)
    level, handler, threads = _logger.level, signal.getsignal(signal.SIGINT), torch.get_num_threads()
    torch.set_num_threads(1)  # what is as small as this is slower with more
    yield
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, handler)
    _logger.setLevel(level)


def run(*arguments):
    """The exit status of `wanda-lightning ARGUMENTS`."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A language model, texts, and an image classifier with images, none of which a command may change."""
    folder = tmp_path_factory.mktemp("inputs")
    save_llama_of_bytes(folder / "llama")
    rng = np.random.default_rng(0)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        for name in ("test_vit", "test_convnext"):
            model = timm.create_model(name)
            model.get_classifier().bias.data[1] = 1e4  # whatever it sees, it says the second class
            save_file(model.state_dict(), folder / f"{name}.safetensors")
    words = ["".join(map(chr, rng.integers(97, 123, 5))) for _ in range(500)]
    (folder / "long.txt").write_text(" ".join(words))
    (folder / "other.txt").write_text(" ".join(reversed(words)))
    (folder / "short.txt").write_text("too short")
    (folder / "empty.txt").write_text(" \n")
    (folder / "latin1.txt").write_bytes("café ".encode("latin1") * 100)
    (folder / "table.csv").write_text("text\nsome\n")
    (folder / "no_text.jsonl").write_text('{"content": "' + "x" * 200 + '"}\n')
    (folder / "short.jsonl").write_text('{"text": "short"}\n{"text": "longer"}\n')
    for part, count in (("train", 3), ("val", 2)):
        for label in ("ape", "bee", "cat", "dog"):
            (folder / "images" / part / label).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "images" / part / label / f"{i}.png")
    return folder


@pytest.fixture
def text(inputs):
    """The options of a fast run on the language model."""
    sizes = ["--nsamples", "4", "--seqlen", SEQLEN, "--limit", "6", "--calibration", inputs / "long.txt"]
    return ["prune", "--model", inputs / "llama", *sizes, "--eval", inputs / "other.txt"]


@pytest.fixture
def images(inputs):
    """The options of a fast run on the image classifier."""
    weights = ["--model", "timm:test_vit", "--resume", inputs / "test_vit.safetensors"]
    return ["prune", *weights, "--data_path", inputs / "images", "--nsamples", "6"]


def zeros_by_layer(model, globs=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")):
    return {name: m.weight == 0 for name, m in model.named_modules() if name.endswith(globs)}


def perplexity_by_hand(model, text, windows):
    """The reference's formula on bytes, with the loss of transformers."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model.name_or_path)
    ids = torch.tensor(tokenizer(text).input_ids[: windows * SEQLEN]).view(windows, SEQLEN)
    with torch.no_grad():
        losses = [model(input_ids=window[None], labels=window[None]).loss.item() for window in ids]
    return math.exp(sum(losses) / len(losses))


def everything_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# --------------------------------------------------------------------------------------------- prune: language models


METHODS = [
    ("wanda", "unstructured", "0.5", []),
    ("wanda", "2:4", "0.5", []),
    ("wanda", "unstructured", "0.25", ["--use_variant"]),
    ("magnitude", "4:8", "0.5", []),
    ("magnitude", "unstructured", "0.25", []),
    ("sparsegpt", "unstructured", "0.5", []),
    ("sparsegpt", "2:4", "0.5", []),
    ("ablate_wanda_seq", "unstructured", "0.5", []),
    ("ablate_mag_iter", "4:8", "0.5", []),
    ("refit", "unstructured", "0.5", []),
    ("admm", "unstructured", "0.5", []),
    ("reconstruct", "unstructured", "0.5", []),
]


@pytest.mark.parametrize(("method", "kind", "ratio", "more"), METHODS)
def test_the_flags_of_the_reference_work_verbatim(inputs, tmp_path, capsys, method, kind, ratio, more):
    flags = f"--model {inputs}/llama --seed 0 --nsamples 4 --sparsity_ratio {ratio} --sparsity_type {kind} "
    flags += f"--prune_method {method} --cache_dir llm_weights --save out/logs --save_model out/model"
    ours = f"--calibration {inputs}/long.txt --eval {inputs}/other.txt --seqlen {SEQLEN} --limit 6"
    assert run("prune", *flags.split(), *more, *ours.split()) == 0
    out, err = capsys.readouterr()

    dense = AutoModelForCausalLM.from_pretrained(inputs / "llama")
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out/model")
    zeros = zeros_by_layer(pruned)
    assert len(zeros) == 14
    reached = torch.cat([where.flatten() for where in zeros.values()]).float().mean().item()
    assert reached == pytest.approx(float(ratio), abs=0.01 if more else 1e-9)
    text = (inputs / "other.txt").read_text()
    measured, before = perplexity_by_hand(pruned, text, 6), perplexity_by_hand(dense, text, 6)
    assert measured != pytest.approx(before, rel=1e-3)

    header, row, end = (tmp_path / f"out/logs/log_{method}.txt").read_text().split("\n")
    assert header == "method\tactual_sparsity\tppl_test"
    assert row.split("\t")[:2] == [method, f"{reached:.4f}"]
    assert row.split("\t")[2] == f"{float(row.split()[2]):.4f}"
    assert float(row.split("\t")[2]) == pytest.approx(measured, rel=1e-6)
    assert end == ""
    report = PruningReport.from_json((tmp_path / "out/logs/pruning_report.json").read_text())
    assert {layer.name: layer.sparsity for layer in report.layers} == {
        name: pytest.approx(where.float().mean().item()) for name, where in zeros.items()
    }
    assert {layer.tokens for layer in report.layers} == {0 if method == "magnitude" else 4 * SEQLEN}
    given = {"model": f"{inputs}/llama", "seed": 0, "nsamples": 4, "seqlen": SEQLEN, "limit": 6}
    given |= {"calibration": f"{inputs}/long.txt", "eval": f"{inputs}/other.txt", "save": "out/logs"}
    given |= {"prune_method": method, "sparsity_type": kind, "sparsity_ratio": float(ratio), "use_variant": bool(more)}
    assert given.items() <= report.config["command"].items()
    both = {"dense": pytest.approx(before, rel=1e-6), "pruned": pytest.approx(measured, rel=1e-6)}
    assert report.config["measured"] == {"metric": "val_perplexity", **both}
    (shown,) = [line.strip("│ ").split("│") for line in out.splitlines() if line.startswith(f"│ {method} ")]
    assert shown[1].strip() == f"{reached:.2%}"
    assert [float(cell) for cell in shown[3:5]] == [pytest.approx(before, abs=0.01), pytest.approx(measured, abs=0.01)]
    assert "Pruning 2/2 done" in err
    assert sorted(os.listdir(tmp_path / "out/logs")) == [f"log_{method}.txt", "pruning_report.json"]
    assert sorted(os.listdir(tmp_path)) == ["out"]

    for name, where in zeros.items():
        weight = dense.get_submodule(name).weight
        if kind != "unstructured":
            size = int(kind[-1])
            assert (where.reshape(-1, size).sum(dim=1) == size // 2).all()
        elif method == "magnitude":  # the smallest of the layer
            assert weight[where].abs().max() < weight[~where].abs().min()
        elif not more and method != "sparsegpt":
            assert (where.sum(dim=1) == where.shape[1] // 2).all()
        kept_as_they_were = torch.equal(pruned.get_submodule(name).weight[~where], weight[~where])
        assert kept_as_they_were == (method in ("wanda", "magnitude"))
    assert torch.equal(pruned.lm_head.weight, dense.lm_head.weight)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out/model")("ab").input_ids


@pytest.mark.parametrize("pattern", ["unstructured", "8:16"])
@pytest.mark.parametrize(("method", "allocation"), [("ria", "owl"), ("wanda", "alpha_layer"), ("magnitude", "owl")])
def test_layers_that_differ_in_sparsity(text, capsys, method, allocation, pattern):
    choices = ["--prune_method", method, "--allocation", allocation, "--sparsity_type", pattern]
    assert run(*text, *choices, "--save", "out", "--save_model", "out/model") == 0
    shown = capsys.readouterr()
    zeros = zeros_by_layer(AutoModelForCausalLM.from_pretrained("out/model"))
    assert torch.cat([where.flatten() for where in zeros.values()]).float().mean() == pytest.approx(0.5, abs=0.01)
    sparsities = {where.float().mean().item() for where in zeros.values()}
    assert len(sparsities) > 1
    report = json.loads(Path("out/pruning_report.json").read_text())
    assert sorted({layer["sparsity"] for layer in report["layers"]}) == pytest.approx(sorted(sparsities))
    assert report["config"]["command"]["allocation"] == allocation
    assert report["config"]["allocation"]["name"] == ("OWL" if allocation == "owl" else "AlphaPruning")
    assert ("Note: mixed N:M: " in shown.out) == (pattern == "8:16")
    assert ("Observing" in shown.err) == (allocation == "owl")


def test_an_unknown_allocation(text, refused):
    refused(*text, "--allocation", "luck", message="luck", code=2)


@pytest.mark.parametrize("preset", ["fast", "balanced", "best"])
def test_a_preset(text, tmp_path, preset):
    assert run(*text, "--preset", preset, "--save", "out", "--save_model", "out/model") == 0
    assert (tmp_path / f"out/log_{preset}.txt").read_text().splitlines()[1].startswith(f"{preset}\t0.5")
    command = PruningReport.from_json((tmp_path / "out/pruning_report.json").read_text()).config["command"]
    assert command["preset"] == preset
    assert "prune_method" not in command
    zeros = zeros_by_layer(AutoModelForCausalLM.from_pretrained("out/model"))
    sparsities = [where.float().mean() for where in zeros.values()]
    assert (max(sparsities) - min(sparsities) > 0.02) == (preset == "best")


def test_a_preset_keeps_to_n_of_m(text):
    assert run(*text, "--preset", "best", "--sparsity_type", "2:4", "--save_model", "out/model") == 0
    for where in zeros_by_layer(AutoModelForCausalLM.from_pretrained("out/model")).values():
        assert (where.reshape(-1, 4).sum(dim=1) == 2).all()


def test_a_preset_of_an_image_classifier(inputs, images, tmp_path, refused):
    refused(*images, "--preset", "best", message="all gradients are 0")  # one class is certain
    weights = load_file(inputs / "test_vit.safetensors")
    torch.manual_seed(0)
    weights["head.bias"].zero_()
    save_file(weights, tmp_path / "trained.safetensors")
    assert run(*images, "--resume", "trained.safetensors", "--preset", "best", "--save", "out") == 0
    report = PruningReport.from_json((tmp_path / "out/pruning_report.json").read_text())
    assert report.config["sequential"] == "layer"
    assert report.sparsity == pytest.approx(0.5, abs=0.01)
    assert len({layer.target for layer in report.layers}) > 1


def test_a_preset_is_a_method(text, refused):
    refused(*text, "--preset", "best", "--prune_method", "wanda", message="--prune_method has no meaning for a preset")
    refused(*text, "--preset", "bset", message="bset", code=2)


def test_skip_dtype_and_granularity(text, tmp_path):
    more = ["--skip", '["*.down_proj", "model.layers.0.self_attn"]', "--dtype", "bfloat16", "--sequential", "layer"]
    assert run(*text, *more, "--batch_size", "2", "--save", "out", "--save_model", "out/model") == 0
    pruned = AutoModelForCausalLM.from_pretrained("out/model")
    assert pruned.dtype == torch.bfloat16
    for name, where in zeros_by_layer(pruned).items():
        skipped = name.endswith("down_proj") or name.startswith("model.layers.0.self_attn")
        assert where.float().mean() == (0 if skipped else 0.5), name
    config = json.loads(Path("out/pruning_report.json").read_text())["config"]
    assert config["sequential"] == "layer"
    assert config["calibration_batches"] == 2


def test_only_some_layers(text):
    assert run(*text, "--only", "re:.*layers.1.*", "--skip", "*.k_proj", "--save_model", "out/model") == 0
    for name, where in zeros_by_layer(AutoModelForCausalLM.from_pretrained("out/model")).items():
        chosen = name.startswith("model.layers.1.") and not name.endswith("k_proj")
        assert where.float().mean() == (0.5 if chosen else 0), name


def test_the_seed_draws_the_calibration(text):
    def masks(name, *more):
        assert run(*text, "--save_model", name, *more) == 0
        return zeros_by_layer(AutoModelForCausalLM.from_pretrained(name))

    first, again, other = masks("a"), masks("b", "--seed", "0"), masks("c", "--seed", "1")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_nothing_is_written_that_was_not_asked_for(text, tmp_path, capsys):
    assert run(*text) == 0
    assert "wanda" in capsys.readouterr().out
    assert everything_in(tmp_path) == []


def test_python_docs_need_no_network(inputs, capsys):
    sources = ["--calibration", "python-docs", "--eval", "python-docs", "--limit", "2", "--nsamples", "2"]
    assert run("prune", "--model", inputs / "llama", *sources, "--save", "out") == 0
    command = json.loads(Path("out/pruning_report.json").read_text())["config"]["command"]
    assert command["calibration"] == command["eval"] == "python-docs"
    assert command["seqlen"] == 64  # the model's context


# -------------------------------------------------------------------------------------------------- prune: images


@pytest.mark.parametrize("group", ["row", "layer"])
@pytest.mark.parametrize(("name", "method"), [("test_vit", "wanda"), ("test_convnext", "magnitude")])
def test_an_image_classifier(inputs, images, tmp_path, capsys, name, method, group):
    options = [str(option).replace("test_vit", name) for option in images]
    more = ["--prune_granularity", group, "--prune_method", method, "--save", "out", "--save_model", "out/model"]
    assert run(*options, *more) == 0
    out = capsys.readouterr().out
    assert "top-1" in out
    assert out.count("25.00%") == 2  # dense and pruned: it says "bee" to all of four classes

    pruned = timm.create_model(f"local-dir:{tmp_path}/out/model", pretrained=True)
    dense = load_file(inputs / f"{name}.safetensors")
    report = PruningReport.from_json((tmp_path / "out/pruning_report.json").read_text())
    assert report.layers
    assert {layer.tokens > 0 for layer in report.layers} == {method == "wanda"}
    rowwise = []
    for layer in report.layers:
        zeros = pruned.get_submodule(layer.name).weight.flatten(1) == 0
        assert int(zeros.sum()) == pytest.approx(zeros.numel() / 2, abs=zeros.shape[0] if group == "row" else 1)
        rowwise.append(bool((zeros.sum(dim=1) == zeros.shape[1] // 2).all()))
    assert all(rowwise) if group == "row" else not any(rowwise)
    assert torch.equal(pruned.get_classifier().weight, dense["head.weight" if name == "test_vit" else "head.fc.weight"])
    _, row, _ = (tmp_path / f"out/log_{method}.txt").read_text().split("\n")
    assert row == f"{method}\t{report.sparsity:.4f}\t0.2500"
    assert {"data_path": f"{inputs}/images", "nsamples": 6}.items() <= report.config["command"].items()
    assert report.config["measured"] == {"metric": "val_accuracy", "dense": 0.25, "pruned": 0.25}


def test_the_digits_that_need_no_network(inputs, capsys):
    weights = ["--model", "timm:test_vit", "--resume", inputs / "test_vit.safetensors"]
    with pytest.MonkeyPatch.context() as patch:  # all 360 take a minute
        from wanda_lightning.data import images as module

        source = module.open_source("digits")
        few = type(source)(list(source.train)[:8], list(source.evaluation)[:8], source.class_names)
        patch.setattr(module, "open_source", lambda *_: few)
        assert run("prune", *weights, "--nsamples", "8") == 0


def test_fewer_images_than_asked(images):
    with pytest.warns(UserWarning, match=r"num_samples is 50, but .* has only 12\."):
        assert run(*images, "--nsamples", "50") == 0


def test_more_logits_than_classes(images):
    with pytest.warns(UserWarning, match="images has 4 classes, but the model tells 1000 apart"):
        assert run(*images) == 0


# ----------------------------------------------------------------------------------- prune: what is refused, and how


@pytest.fixture
def refused(tmp_path, capsys, inputs):
    """Runs a command that must fail with one message and leave every folder as it was."""

    def check(*arguments, message, code=1):
        before = everything_in(tmp_path), everything_in(inputs)
        assert run(*arguments) == code
        out, err = capsys.readouterr()
        assert message in err
        assert "Traceback" not in out + err
        assert (everything_in(tmp_path), everything_in(inputs)) == before
        return err

    return check


OUT = ["--save", "out", "--save_model", "out/model"]
REFUSED = [
    (["--calibration", "{}/gone.txt"], "gone.txt does not exist"),
    (["--eval", "{}/gone.parquet"], "gone.parquet does not exist"),
    (["--calibration", "{}/table.csv"], "ends in .csv"),
    (["--calibration", "wikitext3"], "Did you mean wikitext2?"),
    (["--calibration", "{}/latin1.txt"], "must be in UTF-8"),
    (["--eval", "{}/latin1.txt"], "must be in UTF-8"),
    (["--calibration", "{}/no_text.jsonl"], "line 1 has 'content'"),
    (["--calibration", "{}/empty.txt"], "there is no text in it"),
    (["--calibration", "{}/short.txt"], f"need a text of at least {SEQLEN + 1}, but"),
    (["--calibration", "{}/short.txt"], "has 9."),
    (["--calibration", "{}/short.jsonl"], f"need a document of at least {SEQLEN + 1}, but the longest"),
    (["--eval", "{}/short.txt"], f"A window of seqlen={SEQLEN} tokens was asked for, but"),
    (["--seqlen", "1"], "seqlen must be at least 2"),
    (["--seqlen", "65"], "--seqlen 65 is more than the model can read at once: give at most 64"),
    (["--calibration", "c4"], "Use python-docs, which needs no network, or a FILE (.txt, .jsonl, .parquet)"),
    (["--eval", "wikitext2"], "Use python-docs, which needs no network, or a FILE (.txt, .jsonl, .parquet)"),
    (["--sparsity_ratio", "1"], "in [0, 1), but 1"),
    (["--sparsity_ratio", "-0.5"], "in [0, 1), but -0.5"),
    (["--sparsity_type", "2:4", "--sparsity_ratio", "0.7"], "sparsity must be 0.5 for the pattern 2:4, but it is 0.7"),
    (["--sparsity_type", "4:2"], "1 <= N < M, but it is 4:2"),
    (["--sparsity_type", "0:4"], "1 <= N < M, but it is 0:4"),
    (
        ["--sparsity_type", "3:6"],
        "fits none of the 14 layers that would be pruned, model.layers.0.mlp.gate_proj largest",
    ),
    (["--sparsity_type", "diagonal"], "--sparsity_type is unstructured or N:M such as 2:4, but diagonal was given"),
    (["--use_variant", "--prune_method", "magnitude"], "use --prune_method wanda"),
    (["--use_variant", "--sparsity_type", "2:4"], "--use_variant is for --sparsity_type unstructured, but 2:4"),
    (["--prune_granularity", "row", "--sparsity_type", "2:4"], "--prune_granularity is for --sparsity_type unstr"),
    (["--skip", "[down_proj]"], "skip='down_proj' matches no matrix of the model; the nearest is"),
    (["--skip", "[model]"], "the model has nothing to prune"),
    (["--nsamples", "-1"], "at least 1, but it is -1"),
    (["--limit", "0"], "limit must be at least 1"),
    (["--dtype", "int8"], "one of auto, float32, bfloat16, float16, but it is 'int8'"),
    (["--data_path", "digits"], "--data_path has no meaning for a language model: leave it out"),
    (["--resume", "{}/test_vit.safetensors"], "--resume has no meaning for a language model: leave it out"),
    (["--model", "{}/gone"], "neither a local folder nor the Hugging Face hub"),
    (["--model", "{}/gone.gguf"], "gone.gguf does not exist"),
    (["--model", "{}/images"], "has no config.json"),
    (["--model", "{}/long.txt"], "is another file. Give the folder"),
]


@pytest.mark.parametrize(("more", "message"), REFUSED, ids=[" ".join(more) for more, _ in REFUSED])
def test_refused_for_a_language_model(inputs, text, refused, more, message):
    err = refused(*text, *OUT, *(option.format(inputs) for option in more), message=message)
    assert err.splitlines()[-1].startswith("wanda-lightning: error: ") or "hub" in err


REFUSED_FOR_IMAGES = [
    (["--seqlen", "8", "--limit", "2"], "--seqlen, --limit has no meaning for an image classifier: leave it out"),
    (["--data_path", "{}/gone"], "gone does not exist"),
    (["--data_path", "{}/llama"], "data must have folders of classes"),
    (["--data_path", "cifar10"], "Use digits, which needs no network"),
    (["--resume", "{}/gone.safetensors"], "gone.safetensors does not exist"),
    (["--resume", "weights.pth"], "must be a .safetensors file"),
    (["--resume", "{}/test_convnext.safetensors"], "does not fit VisionTransformer"),
    (["--model", "timm:test_vitt"], "Did you mean test_vit"),
    (["--skip", "[blocks.9]"], "skip='blocks.9' matches no matrix"),
    (["--sparsity_type", "2:4", "--sparsity_ratio", "0.6"], "sparsity must be 0.5 for the pattern 2:4"),
]


@pytest.mark.parametrize(
    ("more", "message"), REFUSED_FOR_IMAGES, ids=[" ".join(more) for more, _ in REFUSED_FOR_IMAGES]
)
def test_refused_for_an_image_classifier(inputs, images, refused, more, message):
    refused(*images, *OUT, *(option.format(inputs) for option in more), message=message)


USAGE = [
    (["prune"], "required: model"),
    (["inspect"], "required: model"),
    (["evaluate"], "required: model"),
    (["fit"], "required"),
    (["prune", "--model", "x", "--sparsity_ratio", "half"], "half"),
    (["prune", "--model", "x", "--prune_method", "luck"], "luck"),
    (["prune", "--model", "x", "--sequential", "row"], "row"),
    (["prune", "--model", "x", "--prune_granularity", "model"], "model"),
    (["prune", "--model", "x", "--colour", "red"], "--colour"),
    (["prune", "--config", "gone.yaml"], "gone.yaml"),
    (["validate", "--config", "gone.yaml"], "gone.yaml"),
    (["pruen"], "there is no command 'pruen'"),
]


@pytest.mark.parametrize(("arguments", "message"), USAGE, ids=[" ".join(arguments) for arguments, _ in USAGE])
def test_wrong_usage_is_exit_2(refused, arguments, message):
    refused(*arguments, message=message, code=2)


@pytest.mark.parametrize("option", ["--save", "--save_model"])
def test_a_folder_that_is_not_empty(text, refused, tmp_path, option):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    refused(*text, option, "mine", message="The folder mine is not empty")
    refused(*text, option, "mine/notes.txt", message="which is a file")
    assert (tmp_path / "mine/notes.txt").read_text() == "mine"
    if option == "--save_model":
        refused(*text, option, "mine", "--overwrite", message="is no model")
        (tmp_path / "mine/config.json").write_text("{}")
    assert run(*text, option, "mine", "--overwrite") == 0
    assert ("pruning_report.json" if option == "--save" else "config.json") in os.listdir("mine")


def test_a_second_run_into_the_same_folder(text, refused):
    assert run(*text, *OUT) == 0
    first = Path("out/log_wanda.txt").read_text()
    refused(*text, *OUT, "--sparsity_ratio", "0.25", message="The folder out is not empty")
    assert Path("out/log_wanda.txt").read_text() == first
    assert run(*text, *OUT, "--sparsity_ratio", "0.25", "--overwrite") == 0
    assert "\t0.2500\t" in Path("out/log_wanda.txt").read_text()
    assert zeros_by_layer(AutoModelForCausalLM.from_pretrained("out/model"))


@pytest.mark.parametrize(
    ("layer", "value", "message"),
    [
        ("model.layers.1.mlp.up_proj", math.nan, "the weight of model.layers.1.mlp.up_proj holds NaN or infinity"),
        ("model.embed_tokens", math.inf, "the weight of model.embed_tokens holds NaN or infinity"),
    ],
)
def test_numbers_that_are_none(inputs, text, refused, tmp_path, layer, value, message):
    shutil.copytree(inputs / "llama", tmp_path / "broken")
    weights = load_file(tmp_path / "broken/model.safetensors")
    weights[f"{layer}.weight"][:, 0] = value
    save_file(weights, tmp_path / "broken/model.safetensors", metadata={"format": "pt"})
    refused(*text, *OUT, "--model", tmp_path / "broken", message=message)


def test_a_failed_write_leaves_nothing_behind(text, tmp_path, monkeypatch):
    def fill_the_disk(model, folder):
        (Path(folder) / "half.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", fill_the_disk)
    assert run(*text, *OUT) == 1
    assert [path for path in everything_in(tmp_path) if path != "out"] == []


# ------------------------------------------------------------------------------------------------------- interruption


@pytest.mark.parametrize("moment", ["forward", "save_pretrained"])
def test_ctrl_c_is_exit_130(text, tmp_path, capsys, monkeypatch, moment):
    original = getattr(LlamaForCausalLM, moment)

    def interrupted(model, *args, **kwargs):
        if moment == "save_pretrained":
            original(model, *args, **kwargs)
        os.kill(os.getpid(), signal.SIGINT)
        return original(model, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, moment, interrupted)
    assert run(*text, *OUT) == 130
    assert "interrupted" in capsys.readouterr().err
    assert [path for path in everything_in(tmp_path) if path != "out"] == []


SLOWED = """
import sys, time
import wanda_lightning.pruning as pruner
from wanda_lightning.cli import main

prune_layers, done = pruner._prune_layers, []

def slowly(*arguments):
    for layer in prune_layers(*arguments):
        done.append(layer)
        if len(done) == 9:  # in the second block
            print("in the middle", flush=True)
            time.sleep(60)
        yield layer

pruner._prune_layers = slowly
sys.exit(main())
"""


def test_ctrl_c_in_the_middle_of_pruning_in_a_real_shell(text, tmp_path):
    command = [sys.executable, "-c", SLOWED, *map(str, text), *OUT]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment
    )
    try:
        assert any("in the middle" in line for line in process.stdout)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "8 layers are already pruned, model.layers.0.self_attn.q_proj first and" in err
    assert "wanda-lightning: interrupted" in err
    assert "Traceback" not in err
    assert everything_in(tmp_path) == []


# -------------------------------------------------------------------------------------- help, configuration, inspect


def test_help_of_the_whole(capsys):
    for arguments in ([], ["--help"], ["-h"]):
        assert run(*arguments) == 0
        out = capsys.readouterr().out
        assert all(command in out for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command(capsys, command):
    assert run(command, "--help") == 0
    out = capsys.readouterr().out
    expected = {"prune": ["--sparsity_ratio", "--use_variant", "python-docs"], "inspect": ["--model", "--skip"]}
    expected["finetune"] = ["--method", "--dense", "--save_model"]
    expected["evaluate"] = ["--model", "--dense", "--tasks_dir", "--task_limit", "python-docs"]
    for option in expected.get(command, ["--trainer.max_epochs", "--model", "--data"]):
        assert option in out


def test_python_m_in_a_real_shell(tmp_path):
    module = [sys.executable, "-m", "wanda_lightning", "--help"]
    done = subprocess.run(module, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.startswith("usage: wanda-lightning COMMAND")
    assert done.stderr == ""


def test_an_unreachable_hub_in_a_real_shell(inputs, tmp_path):
    script = Path(sys.executable).with_name("wanda-lightning")
    sources = ["--calibration", "c4", "--eval", str(inputs / "other.txt"), "--limit", "1", "--save", "out"]
    command = [str(script), "prune", "--model", str(inputs / "llama"), *sources]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("wanda-lightning: error: The data set allenai/c4 was asked for")
    assert "python-docs, which needs no network, or a FILE (.txt, .jsonl, .parquet)" in last
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_options_from_a_file(inputs, text, tmp_path, capsys):
    options = {"model": f"{inputs}/llama", "nsamples": 4, "seqlen": SEQLEN, "limit": 6, "sparsity_type": "2:4"}
    options |= {"calibration": f"{inputs}/long.txt", "eval": f"{inputs}/other.txt", "skip": ["*.down_proj"]}
    options |= {"min_expert_tokens": 7}
    Path("recipe.yaml").write_text(yaml.safe_dump(options))
    assert run("prune", "--config", "recipe.yaml", "--print_config") == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed).items() >= options.items()
    Path("printed.yaml").write_text(printed)
    assert run("prune", "--config", "printed.yaml", "--save", "out") == 0
    report = json.loads(Path("out/pruning_report.json").read_text())
    assert report["config"]["pattern"] == {"name": "NM", "n": 2, "m": 4}
    assert report["config"]["min_expert_tokens"] == 7
    assert len(report["layers"]) == 12
    over = ["--sparsity_type", "unstructured", "--sparsity_ratio", "0.25", "--overwrite"]
    assert run("prune", "--config", "recipe.yaml", *over, "--save", "out") == 0
    assert "\t0.2500\t" in Path("out/log_wanda.txt").read_text()


def test_an_unknown_option_in_a_file(refused):
    Path("recipe.yaml").write_text("modle: x\n")
    refused("prune", "--config", "recipe.yaml", message="modle", code=2)


def test_inspect_a_folder(inputs, capsys, tmp_path):
    shutil.copytree(inputs / "llama", "weightless", ignore=shutil.ignore_patterns("*.safetensors"))
    assert run("inspect", "--model", "weightless", "--skip", "[model.layers.0.mlp]") == 0
    out = capsys.readouterr().out
    assert "11 layers in 2 units hold 14,336 weights" in out  # 8 attention matrices of 32 x 32, three of 32 x 64
    for line in (
        ("model.layers.1", "self_attn.q_proj"),
        ("output head", "lm_head"),
        ("skip='model.layers.0.mlp'", "3"),
    ):
        assert any(all(part in row for part in line) for row in out.splitlines()), line
    assert run("inspect", "--model", "weightless", "--sequential", "layer") == 0
    assert "14 layers in 14 units" in capsys.readouterr().out


def test_inspect_only(inputs, capsys):
    folder = str(inputs / "llama")
    assert run("inspect", "--model", folder, "--only", "*.mlp,model.layers.0.self_attn", "--skip", "*.down_proj") == 0
    out = capsys.readouterr().out
    assert "8 layers in 2 units hold 12,288 weights" in out  # four of 32 x 32, four of 32 x 64
    assert "not in only=['*.mlp'," in out
    assert "skip='*.down_proj'" in out


class LargestOnDevice(TorchDispatchMode):
    """How many numbers the largest tensor holds that is computed meanwhile, outside of the meta device."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                self.size = max(self.size, leaf.numel())
        return output


@pytest.mark.parametrize("name", ["folder", "tiny.gguf", "timm:convnext_tiny"])
def test_inspect_allocates_no_weights(inputs, capsys, name):
    if name == "folder":
        shutil.copytree(inputs / "llama", name, ignore=shutil.ignore_patterns("*.safetensors"))
    elif name == "tiny.gguf":
        write_gguf(name)
    with LargestOnDevice() as largest:
        assert run("inspect", "--model", name) == 0
    assert "layers in" in capsys.readouterr().out
    assert largest.size < 32 * 32  # the smallest matrix


def test_inspect_a_gguf_file_as_its_model(capsys):
    write_gguf("tiny.gguf")
    assert run("inspect", "--model", "tiny.gguf") == 0
    rows = capsys.readouterr().out
    assert "14 layers in 2 units hold 17,408 weights" in rows  # 2 x (4 of 32 x 32 and 3 of 32 x 48)
    assert find_layers(CausalLMModule("tiny.gguf").model).units[0].name in rows


def test_inspect_a_mixture_of_experts(capsys):
    ZOO["mixtral"].build().config.save_pretrained("experts")
    assert run("inspect", "--model", "experts") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "24 layers in 2 units" in out
    assert "router" in out
    assert "gate_up_proj.*" in out
    assert "gate_up_proj.0" not in out


def test_inspect_a_timm_model(capsys):
    assert run("inspect", "--model", "timm:test_convnext", "--sequential", "none") == 0
    out = capsys.readouterr().out
    assert "depthwise convolution" in out
    assert "output head" in out
    assert "in 1 units" in out


def test_inspect_says_what_the_pattern_does_not_fit(inputs, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    folder = str(inputs / "llama")
    assert run("inspect", "--model", folder, "--sparsity_type", "16:64") == 0
    out = capsys.readouterr().out
    assert "2 layers in 2 units hold 4,096 weights" in out
    assert any("input width 32 is not a multiple of 64" in row and " 12 " in row for row in out.splitlines())
    assert "Note: the pattern does not fit 12 layers, model.layers.0.mlp.gate_proj largest (input width 32 is" in out
    assert "Note: only 20% of the weights" in out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model", "timm:test_vit", "--sparsity_type", "diagonal"], "--sparsity_type is unstructured or N:M such as"),
        (["--model", "gone"], "couldn't connect to 'https://huggingface.co'"),
        (["--model", "gone.gguf"], "The GGUF file gone.gguf does not exist"),
        (["--model", "timm:test_vitt"], "Did you mean test_vit"),
        (["--model", "timm:test_vit", "--skip", "[blocks.9]"], "skip='blocks.9' matches no matrix"),
        (["--model", "timm:test_vit", "--only", "blocks.9"], "only='blocks.9' matches no matrix"),
    ],
)
def test_inspect_refuses(refused, more, message):
    refused("inspect", *more, message=message)


# ------------------------------------------------------------------------------------------ fit, validate, test


@pytest.fixture
def recipe(inputs):
    """Writes a recipe of LightningCLI and returns its path."""

    def write(**pruning):
        options = {
            "model": {"class_path": "wanda_lightning.CausalLMModule", "init_args": {"model": f"{inputs}/llama"}},
            "data": {
                "class_path": "wanda_lightning.TextDataModule",
                "init_args": {
                    "calibration": f"{inputs}/long.txt",
                    "evaluation": f"{inputs}/other.txt",
                    "seqlen": SEQLEN,
                    "num_samples": 6,
                    "limit": 6,
                },
            },
            "trainer": {
                "accelerator": "cpu",
                "devices": 1,
                "max_epochs": 1,
                "logger": False,
                "enable_checkpointing": False,
                "enable_progress_bar": False,
                "callbacks": [
                    {
                        "class_path": "wanda_lightning.WandaPrune",
                        "init_args": {"num_samples": 6, "report_dir": "out", **pruning},
                    }
                ],
            },
        }
        Path("recipe.yaml").write_text(yaml.safe_dump(options))
        return "recipe.yaml"

    return write


ONE_OF_FOUR = {"pattern": {"class_path": "wanda_lightning.NM", "init_args": {"n": 1, "m": 4}}, "sparsity": 0.75}
PATTERNS = [({"pattern": "2:4"}, 2), (ONE_OF_FOUR, 1)]


def pruned_as():
    report = json.loads(Path("out/pruning_report.json").read_text())
    return report["config"]["pattern"], report["sparsity"], report["config"]["sparsity"]


@pytest.mark.parametrize(("pruning", "n"), PATTERNS, ids=["name", "class_path"])
def test_validate_a_recipe(recipe, capsys, inputs, tmp_path, pruning, n):
    assert run("validate", "--config", recipe(**pruning)) == 0
    assert "val_perplexity" in capsys.readouterr().out
    assert pruned_as() == ({"name": "NM", "n": n, "m": 4}, 1 - n / 4, 1 - n / 4)
    assert sorted(os.listdir(tmp_path)) == ["out", "recipe.yaml"]


def test_a_recipe_of_choices_within_choices(recipe):
    of_ours = "wanda_lightning.{}".format
    admm = {"class_path": of_ours("ADMM"), "init_args": {"iterations": 2, "rho": [0.2, 0.4]}}
    allocation = {"class_path": of_ours("PerLayer"), "init_args": {"sparsities": {"*.mlp": 0.75}}}
    solver = {"class_path": of_ours("Reconstruct"), "init_args": {"solver": admm, "epochs": 1}}
    path = Path(recipe(allocation=allocation))
    options = yaml.safe_load(path.read_text())
    (callback,) = options["trainer"]["callbacks"]
    callback["class_path"], callback["init_args"]["solver"] = of_ours("PruningCallback"), solver
    path.write_text(yaml.safe_dump(options))
    assert run("validate", "--config", str(path)) == 0
    report = json.loads(Path("out/pruning_report.json").read_text())
    inner = report["config"]["solver"].pop("solver")
    assert (inner["name"], inner["iterations"], inner["rho"]) == ("ADMM", 2, [0.2, 0.4])
    assert report["config"]["solver"] == {"name": "Reconstruct", "epochs": 1, "learning_rate": 0.01}
    assert all((layer["sparsity"] == 0.75) == (".mlp." in layer["name"]) for layer in report["layers"])
    assert report["sparsity"] == 0.5


def test_test_a_recipe_with_dotted_overrides(recipe, capsys):
    callback = [
        "--trainer.callbacks.init_args.pattern",
        "unstructured",
        "--trainer.callbacks.init_args.sparsity",
        "0.25",
    ]
    assert run("test", "--config", recipe(pattern="2:4"), *callback, "--data.init_args.limit", "2") == 0
    assert "test_perplexity" in capsys.readouterr().out
    assert pruned_as() == ({"name": "Unstructured", "group": "row"}, 0.25, 0.25)


@pytest.mark.parametrize(("pruning", "n"), PATTERNS, ids=["name", "class_path"])
def test_fit_a_recipe(recipe, inputs, capsys, pruning, n):
    checkpoints = ["--trainer.enable_checkpointing", "true", "--trainer.default_root_dir", "root"]
    options = ["--model.init_args.lr", "0.01", "--model.init_args.weight_decay", "0.1"]
    path = recipe(**pruning)
    assert run("fit", "--config", path, *checkpoints, *options) == 0
    assert pruned_as()[0] == {"name": "NM", "n": n, "m": 4}
    (checkpoint,) = Path("root/checkpoints").iterdir()
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    dense = load_file(inputs / "llama/model.safetensors")
    for name, weight in dense.items():
        trained = weights[f"model.{name}"]
        assert not torch.equal(trained, weight)
        if name.endswith("proj.weight"):
            assert ((trained != 0).reshape(-1, 4).sum(dim=1) == n).all()
    capsys.readouterr()
    assert run("test", "--config", path, *checkpoints, "--ckpt_path", checkpoint) == 0
    assert "test_perplexity" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("pruning", "message"),
    [
        ({"pattern": "2:4", "sparsity": 0.7}, "sparsity must be 0.5 for the pattern 2:4, but it is 0.7"),
        ({"pattern": "diagonal"}, "no pattern is called 'diagonal'"),
        ({"num_samples": 0}, "num_samples must be at least 1, but it is 0"),
        ({"skip": ["nothing"]}, "skip='nothing' matches no matrix"),
    ],
)
def test_a_recipe_is_refused(recipe, refused, pruning, message):
    refused("validate", "--config", recipe(**pruning), message=message)


def test_a_recipe_on_a_missing_file_is_refused(recipe, refused, inputs):
    more = ["--data.init_args.calibration", f"{inputs}/gone.txt"]
    refused("validate", "--config", recipe(), *more, message="gone.txt does not exist")


def test_print_config_of_a_recipe(recipe, capsys):
    assert run("validate", "--config", recipe(pattern="2:4"), "--print_config") == 0
    (callback,) = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"]
    assert callback["class_path"] == "wanda_lightning.WandaPrune"
    assert callback["init_args"]["pattern"] == "2:4"
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "path",
    [path for path in sorted(RECIPES.rglob("*.yaml")) if path.parent.name != "paper"],  # see test_paper_recipes.py
    ids=lambda path: path.stem,
)
def test_every_recipe_says_how_it_is_run_and_parses(capsys, path):
    root = RECIPES.parent
    (line,) = [line for line in path.read_text().splitlines() if line.startswith("#   wanda-lightning ")]
    command, option, name = line.split()[2:]
    assert option == "--config"
    assert root / name == path
    assert run(command, "--config", path, "--print_config") == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    written = yaml.safe_load(path.read_text())
    if command == "prune":
        assert printed.items() >= written.items()
    else:
        assert printed["model"]["init_args"].items() >= written["model"]["init_args"].items()


def test_there_are_recipes():
    assert list(RECIPES.rglob("*.yaml"))


@pytest.mark.parametrize("option", ["--nsamples", "--seqlen", "--batch_size", "--limit"])
def test_zero_is_not_the_default(text, refused, option):
    refused(*text, *OUT, option, "0", message="0")


def test_a_model_with_missing_weights_is_refused(inputs, tmp_path, capsys):
    folder = tmp_path / "deeper"
    shutil.copytree(inputs / "llama", folder)
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] += 1
    (folder / "config.json").write_text(json.dumps(config))
    assert run("prune", "--model", folder, "--calibration", "python-docs", "--eval", "python-docs") == 1
    assert "they would be random" in capsys.readouterr().err


def test_weights_that_cannot_be_read_are_refused(inputs, tmp_path, capsys):
    folder = tmp_path / "truncated"
    shutil.copytree(inputs / "llama", folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    assert run("prune", "--model", folder, "--calibration", "python-docs", "--eval", "python-docs") == 1
    assert "cannot be used: a file is incomplete or damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option",
    [["--trust_remote_code"], ["--dtype", "float32"], ["--calibration", "python-docs"], ["--eval", "python-docs"]],
)
def test_options_of_language_models_are_refused_for_images(refused, option):
    refused("prune", "--model", "timm:test_vit", *OUT, *option, message=f"{option[0]} has no meaning for an image")


# ---- fine-tuning


@pytest.fixture
def tuned(text, inputs):
    """The options of a fast run on the language model, pruned."""
    assert run(*text, "--save_model", "pruned") == 0
    texts = ["--data", inputs / "long.txt", "--eval", inputs / "other.txt", "--limit", "6"]
    sizes = ["--steps", "3", "--batch_size", "2", "--seqlen", SEQLEN, "--lr", "0.01", "--lora_dropout", "0"]
    return ["finetune", "--model", "pruned", *texts, *sizes]


@pytest.mark.parametrize("method", ["full", "keep-zeros-lora", "lora"])
def test_fine_tuning_keeps_every_zero(tuned, inputs, capsys, method):
    assert run(*tuned, "--method", method, "--dense", inputs / "llama", "--save_model", "tuned") == 0
    dense, pruned, new = (AutoModelForCausalLM.from_pretrained(f) for f in (inputs / "llama", "pruned", "tuned"))
    before, after = zeros_by_layer(pruned), zeros_by_layer(new)
    assert all(torch.equal(before[name], after[name]) for name in before)
    trained = [name for name, weight in new.state_dict().items() if not torch.equal(weight, pruned.state_dict()[name])]
    targets = [name for name in before if name.endswith(("q_proj", "v_proj"))]
    assert trained == list(new.state_dict()) if method == "full" else trained == [f"{name}.weight" for name in targets]
    printed = capsys.readouterr().out
    other = (inputs / "other.txt").read_text()
    for name, model in {"dense": dense, "pruned": pruned, "fine-tuned": new}.items():
        assert f"│ {name:<{26 if method == 'lora' else 10}} │ {perplexity_by_hand(model, other, 6):10.2f} │" in printed
    zeros = sum(int(where.sum()) for where in before.values())
    assert f"Zeros before: {zeros:,}, after: {zeros:,}." in printed


def test_all_linear_adapters(tuned):
    assert run(*tuned, "--target_modules", "all-linear", "--save_model", "tuned") == 0
    pruned, new = (AutoModelForCausalLM.from_pretrained(folder) for folder in ("pruned", "tuned"))
    for name in zeros_by_layer(pruned):
        assert not torch.equal(pruned.get_submodule(name).weight, new.get_submodule(name).weight)


def test_all_weights_of_a_model_in_16_bits_train_in_float32(tuned):
    AutoModelForCausalLM.from_pretrained("pruned", dtype=torch.bfloat16).save_pretrained("pruned")
    assert run(*tuned, "--lr", "1e-6", "--method", "full", "--save_model", "tuned") == 0
    pruned, new = AutoModelForCausalLM.from_pretrained("pruned"), AutoModelForCausalLM.from_pretrained("tuned")
    assert (pruned.dtype, new.dtype) == (torch.bfloat16, torch.float32)
    before, after = zeros_by_layer(pruned), zeros_by_layer(new)
    for name in before:
        assert torch.equal(before[name], after[name])
        assert not torch.equal(pruned.get_submodule(name).weight.float(), new.get_submodule(name).weight)


def test_adapters_without_peft_are_explained(tuned, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    refused(*tuned, message="Adapters need peft: pip install 'wanda_lightning[lora]'")


def test_what_cannot_be_fine_tuned(tuned, inputs, refused, tmp_path):
    refused(*tuned, "--model", inputs / "llama", message="has no zeros to keep: prune it first")
    refused(*tuned, "--steps", "0", message="--steps is at least 1, but 0 was given")
    refused(*tuned, "--seqlen", "65", message="--seqlen 65 is more than the model can read at once: give at most 64")
    refused(*tuned, "--target_modules", "no_such", message="no_such")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    refused(*tuned, "--save_model", "mine", message="The folder mine is not empty")
    refused(*tuned, "--save_model", "mine", "--overwrite", message="is no model")
