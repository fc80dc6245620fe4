"""`wanda-lightning evaluate` and `inspect`: numbers against loops by hand, and what is refused."""

import json
import os
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from support.cli import IGNORED_WARNINGS, SEQLEN, perplexity_by_hand, run, save_noise
from support.data import byte_tokenizer
from support.gguf import write_gguf
from support.tasks import DOCUMENTS, accuracies_by_hand, tiny_llama, tiny_tokenizer, write_tasks
from support.zoo import ZOO
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, T5Config, TorchAoConfig

from wanda_lightning.cli import inspect_command
from wanda_lightning.evaluation import PAPER_TASKS, sparsity_of
from wanda_lightning.modules import CausalLMModule, ImageClassifierModule

pytestmark = IGNORED_WARNINGS


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Language models dense and with zeros, a text, tasks; image classifiers and images. No command may change them."""
    folder = tmp_path_factory.mktemp("inputs")
    for name in ("dense", "pruned"):
        model = tiny_llama(0)
        if name == "pruned":
            model.model.layers[0].mlp.up_proj.weight.data[:, ::2] = 0
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    rng = np.random.default_rng(0)
    for name in ("text.txt", "other.txt"):
        (folder / name).write_text(
            " ".join("".join(map(chr, rng.integers(97, 123, 5))) for _ in range(500))
        )
    write_tasks(folder / "tasks")
    with torch.random.fork_rng(devices=[]):
        for seed in (1, 2):
            torch.default_generator.manual_seed(seed)
            module = ImageClassifierModule("test_vit", pretrained=False, num_classes=8)
            nn.init.normal_(module.model.get_classifier().weight)
            module.save_pretrained(folder / f"vit{seed}")
    for label in range(8):
        save_noise(folder / "images" / str(label), 3, rng)
    return folder


@pytest.fixture
def side_by_side(stored):
    """The options of a fast run on two language models."""
    text = ["--evaluation", stored / "text.txt", "--limit", "5", "--seqlen", SEQLEN]
    return ["evaluate", "--model", stored / "pruned", "--dense", stored / "dense", *text]


def test_models_side_by_side(stored, side_by_side, tmp_path, capsys, monkeypatch):
    loaded = []

    def load(*arguments, **options):
        assert all(module() is None for module in loaded), "more than one model is in memory"
        module = CausalLMModule(*arguments, **options)
        loaded.append(weakref.ref(module.model))
        return module

    monkeypatch.setattr("wanda_lightning.cli.model_and_data.CausalLMModule", load)
    shutil.copytree(stored / "dense", tmp_path / "copy")
    write_tasks(tmp_path / "mine")
    texts = [str(stored / "text.txt"), str(stored / "other.txt")]
    tasks = ["--tasks", "arc_easy,boolq"]
    several = [
        "--model",
        f"{stored}/pruned,copy",
        "--evaluation",
        ",".join(texts),
        "--save",
        "out/results.json",
    ]
    assert run(*side_by_side, *several, *tasks, "--tasks_dir", "mine", "--batch_size", "3") == 0
    out = capsys.readouterr().out
    written = json.loads(Path("out/results.json").read_text())
    dense = f"{stored}/dense"
    pruned = f"{stored}/pruned"
    assert (list(written["models"]), written["dense"]) == ([dense, pruned, "copy"], dense)
    assert (written["config"]["limit"], len(loaded)) == (5, 3)
    assert written["models"][dense] == written["models"]["copy"]
    for folder, found in written["models"].items():
        model = AutoModelForCausalLM.from_pretrained(folder)
        for text in texts:
            expected = pytest.approx(perplexity_by_hand(model, Path(text).read_text(), 5), rel=1e-6)
            assert found[text] == {"perplexity": expected, "windows": 5}
        for name in ("arc_easy", "boolq"):
            assert (
                found[name]["acc"]
                == accuracies_by_hand(model, tiny_tokenizer(), name, DOCUMENTS[name])["acc"]
            )
        zeros = sum(int((p == 0).sum()) for p in model.parameters())
        assert zeros == (64 * 32 / 2 if folder == pruned else 0)
        assert found["sparsity"]["model"] == zeros / sum(p.numel() for p in model.parameters())
    before, after = (
        written["models"][folder][texts[0]]["perplexity"] for folder in (dense, pruned)
    )
    for shown in (
        f"{after:.2f} ({after - before:+.2f})",
        "arc_easy acc_norm ",
        "boolq acc ",
        "mean acc ",
    ):
        assert shown in out
    assert sorted(os.listdir(tmp_path)) == ["copy", "mine", "out"]


def test_zeros_of_a_model_quantized_by_torchao(stored):
    from torchao.quantization import Int8WeightOnlyConfig  # slow to import

    method = TorchAoConfig(Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(stored / "pruned", quantization_config=method)
    weights = [m.weight.dequantize() for name, m in model.named_modules() if name.endswith("proj")]
    zeros, size = (
        sum(int(count(w)) for w in weights) for count in (lambda w: (w == 0).sum(), torch.numel)
    )
    assert sparsity_of(model)["layers"] == zeros / size >= 1024 / size


@torch.no_grad()
def accuracies_of_images(model, images):
    """The shares of images whose label is among the first output, and the first five."""
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model.eval()))
    paths = sorted(images.glob("*/*"))
    orders = (
        model(torch.stack([transform(Image.open(path)) for path in paths]))
        .argsort(descending=True)
        .tolist()
    )
    ranks = [order.index(int(path.parent.name)) for path, order in zip(paths, orders, strict=True)]
    return {f"top-{k}": pytest.approx(sum(rank < k for rank in ranks) / 24) for k in (1, 5)} | {
        "images": 24
    }


def test_image_classifiers_side_by_side(stored, capsys):
    models = [
        timm.create_model(f"local-dir:{stored}/vit{seed}", pretrained=True) for seed in (1, 2)
    ]
    save_file(models[1].state_dict(), "weights.safetensors")
    folder = f"timm:local-dir:{stored}/vit1"
    options = ["--data", stored / "images", "--batch_size", "5", "--save", "results.json"]
    assert (
        run(
            "evaluate",
            "--model",
            folder,
            "--checkpoint",
            "weights.safetensors",
            "--dense",
            folder,
            *options,
        )
        == 0
    )
    assert "top-5" in capsys.readouterr().out
    found = json.loads(Path("results.json").read_text())["models"]
    assert list(found) == [folder, f"{folder} weights.safetensors"]
    for results, model in zip(found.values(), models, strict=True):
        assert results[f"{stored}/images"] == accuracies_of_images(model, stored / "images")
        assert results["sparsity"] == {"layers": 0.0, "model": sparsity_of(model)["model"]}


REFUSED = [
    (["--tasks", "rte,boolq", "--tasks_dir", "{}"], "does not have rte.jsonl, boolq.jsonl"),
    (
        ["--tasks", "boolq"],
        "cannot be downloaded from the Hugging Face hub. Put them into files: --tasks_dir DIR",
    ),
    (["--dense", "{}/images"], "key in its config.json"),
    (["--model", "other"], "but other splits"),
    (["--model", "mute"], "tokenizer must be given"),
    (
        ["--model", "bin"],
        "the only format that is read, but bin has config.json, pytorch_model.bin. Convert a ",
    ),
]


@pytest.mark.parametrize(("more", "message"), REFUSED)
def test_refused_before_anything_is_measured(
    stored, side_by_side, refused, monkeypatch, more, message
):
    monkeypatch.setattr("wanda_lightning.cli.evaluate_command.measure", None)
    monkeypatch.setattr("wanda_lightning.cli.evaluate_command.zero_shot", None)
    for name in ("other", "mute"):
        tiny_llama(0).save_pretrained(name)
    byte_tokenizer().save_pretrained("other")
    tiny_llama(0).config.save_pretrained("bin")
    Path("bin/pytorch_model.bin").touch()
    refused(*side_by_side, *(option.replace("{}", str(stored)) for option in more), message=message)


def test_zero_shot_after_pruning(stored, capsys, monkeypatch):
    sizes = [
        "--num_samples",
        "4",
        "--seqlen",
        SEQLEN,
        "--limit",
        "2",
        "--calibration",
        stored / "text.txt",
    ]
    command = [
        "prune",
        "--model",
        stored / "dense",
        *sizes,
        "--evaluation",
        stored / "text.txt",
        "--eval_zero_shot",
    ]
    command += ["--tasks_dir", stored / "tasks", "--save", "log", "--save_model", "model"]
    with monkeypatch.context() as patched:
        patched.setattr("wanda_lightning.cli.prune_command.zero_shot", lambda *_: os.stat("gone"))
        assert run(*command) == 2
    # All is saved before the tasks.
    assert json.loads(Path("log/pruning_report.json").read_text())["run"]["after"] > 1
    assert sparsity_of(AutoModelForCausalLM.from_pretrained("model"))["layers"] == 0.5
    assert run(*command, "--overwrite") == 0
    out = capsys.readouterr().out
    measured = json.loads(Path("log/pruning_report.json").read_text())["run"]["zero_shot"]
    assert list(measured) == [*PAPER_TASKS, "mean"]
    pruned = AutoModelForCausalLM.from_pretrained("model")
    assert sparsity_of(pruned)["layers"] == 0.5
    for name in {*PAPER_TASKS} - {"hellaswag", "winogrande"}:  # their prompts are not made by hand
        assert (
            measured[name]["acc"]
            == accuracies_by_hand(pruned, tiny_tokenizer(), name, DOCUMENTS[name])["acc"]
        )
        assert f"{name} acc " in out
    assert f"{measured['mean']['acc']:.2%}" in out
    assert AutoTokenizer.from_pretrained("model").pad_token is None


def test_inspect_a_folder_without_weights(inputs, capsys):
    # No markup.
    shutil.copytree(
        inputs / "llama", "[red]x[/green]", ignore=shutil.ignore_patterns("*.safetensors")
    )
    assert run("inspect", "--model", "[red]x[/green]", "--skip", "model.layers.0.mlp") == 0
    out = capsys.readouterr().out
    assert "[red]x[/green]: would be pruned" in out
    # 8 attention matrices of 32 x 32, three of 32 x 64.
    assert "11 layers at 2 stops hold 14,336 weights" in out
    for first, second in (("output head", "lm_head"), ("skip='model.layers.0.mlp'", "3")):
        assert any(first in row and second in row for row in out.splitlines())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "tiny.gguf",
            ["14 layers at 2 stops hold 17,408 weights"],
        ),  # 2 x (4 of 32 x 32 and 3 of 32 x 48)
        (
            "timm:convnext_tiny",
            ["with --sequential none", "depthwise", "output head", "at 1 stop hold"],
        ),
        ("experts", ["24 layers at 2 stops", "router", "gate_up_proj.*"]),
    ],
)
def test_inspect_allocates_no_weights(capsys, monkeypatch, name, expected):
    built = []
    build = inspect_command.model_from_config
    monkeypatch.setattr(
        inspect_command, "model_from_config", lambda source: built.append(build(source)) or built[0]
    )
    write_gguf("tiny.gguf")
    ZOO["mixtral"].build().config.save_pretrained("experts")
    assert run("inspect", "--model", name) == 0
    assert all(parameter.is_meta for parameter in built[0].parameters())
    out = " ".join(capsys.readouterr().out.split())
    assert all(part in out for part in expected)
    assert "gate_up_proj.0" not in out


def test_inspect_says_what_the_pattern_does_not_fit_or_does(inputs, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    sparsity = ["--sparsity", "0.75"]
    assert run("inspect", "--model", inputs / "llama", "--pattern", "16:64", *sparsity) == 0
    out = capsys.readouterr().out
    assert any(
        "input width 32 is not a multiple of 64" in row and " 12 " in row
        for row in out.splitlines()
    )
    assert (
        "Note: the pattern does not fit 12 layers, model.layers.0.mlp.gate_proj largest (input width 32 is"
        in out
    )
    assert "Note: only 20% of the weights" in out
    assert run("inspect", "--model", inputs / "llama", "--pattern", "structured") == 0
    assert (
        "prunes only those of these layers that write or read hidden units"
        in capsys.readouterr().out
    )


def test_blocks_that_are_alike_share_a_row_and_the_memory_of_streaming_is_named(inputs, capsys):
    model = AutoModelForCausalLM.from_pretrained(inputs / "llama")
    model.config.num_hidden_layers = 30
    model.config.save_pretrained("deep")
    assert run("inspect", "--model", "deep") == 0
    *rows, last = capsys.readouterr().out.splitlines()
    assert [row.split("│")[1].strip() for row in rows if "self_attn.q_proj" in row] == [
        "model.layers.0 to model.layers.29, each of 30"
    ]
    block = sum(each.nbytes for each in model.model.layers[0].parameters())
    held = 2 * block + 128 * 64 * 32 * 4
    assert last.startswith(
        f"prune --stream holds {held / 1e6:.3g} MB for a while: twice the largest block "
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--pattern", "3:6"], "pattern=NM(n=3, m=6) fits none of the 14 layers"),
        (["--skip", "model"], "model has nothing to prune"),
        (
            ["--model", "gone"],
            "configuration of 'gone' cannot be loaded: no file or folder has this name: ",
        ),
        (["--model", "t5"], "model must be a decoder, but t5 is an encoder-decoder."),
        (
            ["--model", "timm:test_vit", "--pattern", "experts"],
            "pattern='experts' needs a mixture of experts",
        ),
    ],
)
def test_inspect_refuses(inputs, refused, more, message):
    T5Config(num_layers=1).save_pretrained("t5")
    refused("inspect", "--model", inputs / "llama", *more, message=message)
