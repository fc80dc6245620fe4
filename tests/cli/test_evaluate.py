"""`wanda-lightning evaluate` and zero-shot tasks after pruning: numbers against loops by hand, and what is refused."""

import json
import os
import re
import shutil
import sys
import weakref
from pathlib import Path

import gguf
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.cli import IGNORED_WARNINGS, SEQLEN, perplexity_by_hand, run, save_noise
from support.data import byte_tokenizer
from support.gguf import write_gguf
from support.tasks import (
    DOCUMENTS,
    accuracies_by_hand,
    needs_lm_eval,
    tiny_llama,
    tiny_tokenizer,
    write_tasks,
)
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TorchAoConfig

from wanda_lightning.cli import measuring
from wanda_lightning.cli import pruning as runs
from wanda_lightning.evaluation import PAPER_TASKS, sparsity_of
from wanda_lightning.modules import CausalLMModule, ImageClassifierModule

pytestmark = IGNORED_WARNINGS


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch):
    """Find no data set that was downloaded before."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path.parent / "no_cache")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Language models dense and with zeros, a text, tasks; image classifiers and images. No command may change them."""
    folder = tmp_path_factory.mktemp("inputs")
    for name in ("dense", "pruned"):
        model = tiny_llama(0)
        if name == "pruned":
            model.model.layers[0].mlp.up_proj.weight.data[:, ::2] = 0
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    rng = np.random.default_rng(0)
    words = ["".join(map(chr, rng.integers(97, 123, 5))) for _ in range(500)]
    (folder / "text.txt").write_text(" ".join(words))
    (folder / "other.txt").write_text(" ".join(reversed(words)))
    (folder / "short.txt").write_text("too short")
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
def refused(refused, monkeypatch):
    """Runs a command that must fail before anything is measured."""

    def measured(*arguments, **options):
        raise AssertionError("something was measured")

    for name in ("measure", "zero_shot"):
        for user in (measuring, runs):  # both imported before, or the second would take the patched function
            monkeypatch.setattr(user, name, measured)
    return refused


@pytest.fixture
def side_by_side(inputs):
    """The options of a fast run on two language models."""
    text = ["--evaluation", inputs / "text.txt", "--limit", "5", "--seqlen", SEQLEN]
    return ["evaluate", "--model", inputs / "pruned", "--dense", inputs / "dense", *text]


@needs_lm_eval
def test_models_side_by_side(inputs, side_by_side, tmp_path, capsys):
    write_tasks(tmp_path / "mine")
    tasks = ["--tasks", "arc_easy,boolq", "--tasks_dir", "mine", "--batch_size", "3"]
    assert run(*side_by_side, *tasks, "--save", "out/results.json") == 0
    out = capsys.readouterr().out
    written = json.loads(Path("out/results.json").read_text())
    dense, pruned = f"{inputs}/dense", f"{inputs}/pruned"
    assert list(written["models"]) == [dense, pruned]
    assert written["dense"] == dense
    assert written["config"]["limit"] == 5
    assert written["versions"]["lm_eval"]
    text, tokenizer = inputs / "text.txt", tiny_tokenizer()
    for folder, found in written["models"].items():
        model = AutoModelForCausalLM.from_pretrained(folder)
        expected = pytest.approx(perplexity_by_hand(model, text.read_text(), 5), rel=1e-6)
        assert found[str(text)] == {"perplexity": expected, "windows": 5}
        for name in ("arc_easy", "boolq"):
            assert found[name]["acc"] == accuracies_by_hand(model, tokenizer, name, DOCUMENTS[name])["acc"]
        weights = [m.weight for name, m in model.named_modules() if name.endswith("proj")]
        zeros, size = sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)
        assert found["sparsity"]["layers"] == zeros / size
        assert found["sparsity"]["model"] == zeros / sum(p.numel() for p in model.parameters())
        assert zeros == (0 if folder == dense else 64 * 32 / 2)
    before, after = (written["models"][folder][str(text)]["perplexity"] for folder in (dense, pruned))
    (shown,) = [line for line in out.splitlines() if "perplexity" in line]
    assert [cell.strip() for cell in shown.strip("│").split("│")[1:]] == [
        f"{before:.2f}",
        f"{after:.2f} ({after - before:+.2f})",
    ]
    (shown,) = [line for line in out.splitlines() if "sparsity of prunable layers" in line]
    sparsity = 100 * written["models"][pruned]["sparsity"]["layers"]
    assert [cell.strip() for cell in shown.strip("│").split("│")[1:]] == ["0.00%", f"{sparsity:.2f}% (+{sparsity:.2f})"]
    assert all(f"{row} " in out for row in ("arc_easy acc", "arc_easy acc_norm", "boolq acc", "mean acc"))
    assert "boolq acc_norm" not in out
    assert "stderr" not in out
    assert sorted(os.listdir(tmp_path)) == ["mine", "out"]


def lost_zeros(*models, pruned):
    """The share of the zeros of a pruned model that other models have lost, and the sparsity of their layers."""
    options = ["--pruned", pruned, "--evaluation", "", "--save", "lost.json", "--overwrite"]
    assert run("evaluate", "--model", ",".join(map(str, models)), *options) == 0
    found = json.loads(Path("lost.json").read_text())["models"]
    assert list(found) == [str(pruned), *map(str, models)]
    assert "lost" not in found[str(pruned)]["sparsity"]
    return [found[str(model)]["sparsity"] for model in models]


def test_zeros_that_versions_of_a_model_have_lost(inputs, capsys):
    for name in ("copy", "tuned"):
        shutil.copytree(inputs / "pruned", name)
    tensors = load_file("tuned/model.safetensors")
    weight = tensors["model.layers.0.mlp.up_proj.weight"].view(-1)
    weight[torch.nonzero(weight == 0)[:7]] = 1e-30
    tensors["model.layers.1.mlp.up_proj.weight"].zero_()  # more zeros lose none
    save_file(tensors, "tuned/model.safetensors", metadata={"format": "pt"})
    copy, tuned = lost_zeros("copy", "tuned", pruned=inputs / "pruned")
    assert copy["lost"] == 0
    assert tuned["lost"] == 7 / 1024
    assert "sparsity of the pruned model that is lost" in capsys.readouterr().out


@pytest.mark.parametrize("qtype", [gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_1])
def test_zeros_that_gguf_files_have_lost(tmp_path, qtype):
    tensors, lost = write_gguf("pruned.gguf", 0.5), 0
    write_gguf("quantized.gguf", 0.5, qtype)
    matrices = [tensor for name, tensor in tensors.items() if name.startswith("blk") and tensor.ndim == 2]
    for tensor in (each for each in matrices if each.shape[1] % 32 == 0):
        back = gguf.dequantize(gguf.quantize(tensor, qtype), qtype)
        lost += sum(1 for was, now in zip(tensor.flat, back.flat, strict=True) if was == 0 and now != 0)
    assert (lost == 0) == (qtype is gguf.GGMLQuantizationType.Q8_0)
    zeros = sum(int(np.sum(tensor == 0)) for tensor in matrices)
    assert lost_zeros("quantized.gguf", pruned="pruned.gguf")[0]["lost"] == lost / zeros


def test_a_model_quantized_by_torchao_keeps_its_zeros(inputs):
    quantization = pytest.importorskip("torchao.quantization")
    method = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(inputs / "pruned", quantization_config=method)
    model.save_pretrained("quantized")
    (found,) = lost_zeros("quantized", pruned=inputs / "pruned")
    weights = [m.weight.dequantize() for name, m in model.named_modules() if name.endswith("proj")]
    zeros, size = (sum(int(count(w)) for w in weights) for count in (lambda w: (w == 0).sum(), torch.numel))
    assert zeros >= 1024
    assert found["lost"] == 0
    assert found["layers"] == zeros / size


@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_quantized_by_bitsandbytes_keeps_its_zeros(inputs, bits):
    pytest.importorskip("bitsandbytes")
    method = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(inputs / "pruned", quantization_config=method)
    model.save_pretrained("quantized")
    assert lost_zeros("quantized", pruned=inputs / "pruned")[0]["lost"] == 0


def test_several_texts_and_models_without_a_dense_one(inputs, tmp_path, capsys, monkeypatch):
    loaded = []

    def load(*arguments, **options):
        assert all(module() is None for module in loaded), "more than one model is in memory"
        module = CausalLMModule(*arguments, **options)
        loaded.append(weakref.ref(module.model))
        return module

    monkeypatch.setattr("wanda_lightning.cli.measuring.CausalLMModule", load)
    shutil.copytree(inputs / "dense", tmp_path / "copy")
    several = [f"{inputs}/pruned, {inputs}/dense,copy", "--evaluation", f"{inputs}/text.txt,{inputs}/other.txt"]
    assert run("evaluate", "--model", *several, "--limit", "2", "--save", "results.json") == 0
    assert len(loaded) == 6
    assert not re.search(r"\([+-]", capsys.readouterr().out)
    written = json.loads(Path("results.json").read_text())
    assert list(written["models"]) == [f"{inputs}/pruned", f"{inputs}/dense", "copy"]
    assert written["dense"] is None
    pruned, dense, copy = written["models"].values()
    assert list(dense) == ["sparsity", f"{inputs}/text.txt", f"{inputs}/other.txt"]
    assert dense == copy
    assert dense != pruned


def test_the_context_is_the_window_and_nothing_is_written_unasked(inputs, tmp_path, capsys):
    assert run("evaluate", "--model", inputs / "dense", "--evaluation", inputs / "text.txt") == 0
    model = AutoModelForCausalLM.from_pretrained(inputs / "dense")
    expected = perplexity_by_hand(model, (inputs / "text.txt").read_text(), seqlen=256)
    assert f" {expected:.2f} " in capsys.readouterr().out
    assert os.listdir(tmp_path) == []


def accuracies_of_images(model, images):
    """The shares of images whose label is among the first output, and the first five."""
    model = model.eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    hits = {1: 0, 5: 0}
    for path in sorted(images.glob("*/*")):
        with torch.no_grad():
            order = model(transform(Image.open(path))[None])[0].argsort(descending=True).tolist()
        for k in hits:
            hits[k] += int(path.parent.name) in order[:k]
    return {f"top-{k}": pytest.approx(count / 24) for k, count in hits.items()} | {"images": 24}


def test_image_classifiers_side_by_side(inputs, capsys):
    models = [timm.create_model(f"local-dir:{inputs}/vit{seed}", pretrained=True) for seed in (1, 2)]
    save_file(models[1].state_dict(), "weights.safetensors")
    folder = f"timm:local-dir:{inputs}/vit1"
    options = ["--data", inputs / "images", "--batch_size", "5", "--save", "results.json"]
    assert run("evaluate", "--model", folder, "--checkpoint", "weights.safetensors", "--dense", folder, *options) == 0
    out = capsys.readouterr().out
    assert "top-1" in out
    assert "top-5" in out
    found = json.loads(Path("results.json").read_text())["models"]
    assert list(found) == [folder, f"{folder} weights.safetensors"]
    for results, model in zip(found.values(), models, strict=True):
        assert results[f"{inputs}/images"] == accuracies_of_images(model, inputs / "images")
        assert results["sparsity"] == {"layers": 0.0, "model": sparsity_of(model)["model"]}


# ------------------------------------------------------------------------------------------- what is refused, and how


OF_TASKS = [
    (["--tasks", "rte,boolq", "--tasks_dir", "{}"], "does not have rte.jsonl, boolq.jsonl"),
    (["--tasks", "boolq"], "cannot be downloaded from the Hugging Face hub. Put them into files: --tasks_dir DIR"),
]
OF_LANGUAGE_MODELS = [
    (["--evaluation", "{}/short.txt"], f"seqlen={SEQLEN} needs a text of at least {SEQLEN} tokens"),
    (["--dense", "{}/images"], "key in its config.json"),
    (["--pruned", "{}/dense"], "pruned must be a pruned model, but no layer of {}/dense has a zero."),
]


@pytest.mark.parametrize(
    ("more", "message"), [*OF_LANGUAGE_MODELS, *(pytest.param(*case, marks=needs_lm_eval) for case in OF_TASKS)]
)
def test_refused_before_anything_is_measured(inputs, side_by_side, refused, more, message):
    more, message = [option.replace("{}", str(inputs)) for option in more], message.replace("{}", str(inputs))
    refused(*side_by_side, *more, message=message)


def test_models_that_cannot_be_compared(inputs, side_by_side, refused, tmp_path):
    shutil.copytree(inputs / "dense", tmp_path / "shorter")
    config = json.loads(Path("shorter/config.json").read_text())
    Path("shorter/config.json").write_text(json.dumps({**config, "max_position_embeddings": 64}))
    several = ["--model", f"{inputs}/dense,shorter", "--evaluation", inputs / "text.txt"]
    refused("evaluate", *several, message="reads 64 tokens at once and another model 256. Use --seqlen 64")
    for name in ("other", "mute"):
        tiny_llama(0).save_pretrained(tmp_path / name)
    byte_tokenizer().save_pretrained(tmp_path / "other")
    refused(*side_by_side, "--model", "other", message="but other splits")
    refused(*side_by_side, "--model", "mute", message="mute must have a tokenizer")
    images = ["--model", f"timm:local-dir:{inputs}/vit1,timm:test_vitt", "--data", inputs / "images"]
    refused("evaluate", *images, message="Unknown model (test_vitt)")


# ----------------------------------------------------------------------------------------------- after pruning


@pytest.fixture
def pruning(inputs):
    sizes = ["--num_samples", "4", "--seqlen", SEQLEN, "--limit", "2", "--calibration", inputs / "text.txt"]
    return ["prune", "--model", inputs / "dense", *sizes, "--evaluation", inputs / "text.txt"]


@needs_lm_eval
def test_zero_shot_after_pruning(inputs, pruning, capsys):
    command = [*pruning, "--eval_zero_shot", "--tasks_dir", inputs / "tasks", "--save", "log", "--save_model", "model"]
    assert run(*command) == 0
    out = capsys.readouterr().out
    measured = json.loads(Path("log/pruning_report.json").read_text())["run"]["zero_shot"]
    assert list(measured) == [*PAPER_TASKS, "mean"]
    pruned = AutoModelForCausalLM.from_pretrained("model")
    assert sparsity_of(pruned)["layers"] == 0.5
    for name in PAPER_TASKS:
        found = measured[name]
        expected = accuracies_by_hand(pruned, tiny_tokenizer(), name, DOCUMENTS[name])
        assert {"acc": found["acc"], "acc_norm": found.get("acc_norm", expected["acc_norm"])} == expected
        assert f"{name} acc " in out
    assert f"{measured['mean']['acc']:.2%}" in out
    assert AutoTokenizer.from_pretrained("model").pad_token is None


@needs_lm_eval
def test_a_pruned_model_is_saved_before_its_tasks(inputs, pruning, monkeypatch):
    def fails(*arguments):
        raise OSError("out of patience")

    monkeypatch.setattr("wanda_lightning.cli.pruning.zero_shot", fails)
    folders = ["--save", "log", "--save_model", "model"]
    assert run(*pruning, "--eval_zero_shot", "--tasks_dir", inputs / "tasks", *folders) == 2
    assert json.loads(Path("log/pruning_report.json").read_text())["run"]["after"] > 1
    assert sparsity_of(AutoModelForCausalLM.from_pretrained("model"))["layers"] == 0.5


@needs_lm_eval
def test_zero_shot_is_refused_before_pruning(inputs, pruning, refused, monkeypatch):
    options = [*pruning, "--eval_zero_shot", "--tasks_dir", inputs, "--save", "log"]
    refused(*options, message="does not have boolq.jsonl, rte.jsonl")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    refused(*options, message="pip install '.[eval]' in the source folder")
