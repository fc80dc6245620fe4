"""`wanda-lightning evaluate`, and tasks after `prune`: numbers against loops by hand, and what is refused."""

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
from support.cli import (
    IGNORED_WARNINGS,
    SEQLEN,
    agreement_by_hand,
    perplexity_by_hand,
    run,
    save_noise,
)
from support.data import byte_tokenizer
from support.layers import seed
from support.reports import read_json
from support.tasks import DOCUMENTS, accuracies_by_hand, tiny_llama, tiny_tokenizer, write_tasks
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig

from wanda_lightning.evaluation import PAPER_TASKS, sparsity_of
from wanda_lightning.lightning_modules import CausalLMModule, ImageClassifierModule

pytestmark = IGNORED_WARNINGS


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Language models dense and with zeros, tasks; image classifiers and images. No command may change them."""
    folder = tmp_path_factory.mktemp("inputs")
    for name in ("dense", "pruned"):
        model = tiny_llama(0)
        if name == "pruned":
            model.model.layers[0].mlp.up_proj.weight.data[:, ::2] = 0
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    write_tasks(folder / "tasks")

    for number in (1, 2):
        with seed(number):
            module = ImageClassifierModule("test_vit", pretrained=False, num_classes=8)
            nn.init.normal_(module.model.get_classifier().weight)
            module.save_pretrained(folder / f"vit{number}")
    for label in range(8):
        save_noise(folder / "images" / str(label), 3, np.random.default_rng())
    return folder


@pytest.fixture
def side_by_side(stored, inputs):
    """The options of a fast run on two language models."""
    return f"""
    evaluate --model {stored}/pruned --dense {stored}/dense --evaluation {inputs}/long.txt --limit 5 --seqlen {SEQLEN}
    """.split()


def test_models_side_by_side(stored, inputs, side_by_side, tmp_path, capsys):
    shutil.copytree(stored / "dense", tmp_path / "copy")
    write_tasks(tmp_path / "mine")
    dense = f"{stored}/dense"
    pruned = f"{stored}/pruned"
    texts = [str(inputs / "long.txt"), str(inputs / "other.txt")]
    models = ["--model", f"{pruned},copy", "--evaluation", ",".join(texts)]
    more = "--tasks arc_easy,boolq --tasks_dir mine --batch_size 3 --save out/results.json"
    assert run(*side_by_side, *models, *more.split()) == 0

    written = read_json("out/results.json")
    assert list(written["models"]) == [dense, pruned, "copy"]
    assert written["dense"] == dense
    assert written["config"]["limit"] == 5
    assert sorted(os.listdir(tmp_path)) == ["copy", "mine", "out"]
    results = written["models"]
    for text in texts:
        assert results["copy"][text].items() >= results[dense][text].items()
        assert results["copy"][text]["same_top"] == 1
        assert results["copy"][text]["kl_divergence"] == pytest.approx(0, abs=1e-6)
    for folder in (dense, pruned):
        model = AutoModelForCausalLM.from_pretrained(folder)
        zeros = sum(int((parameter == 0).sum()) for parameter in model.parameters())
        assert zeros == (64 * 32 / 2 if folder == pruned else 0)
        assert results[folder]["sparsity"]["model"] == zeros / model.num_parameters()
        for path in texts:
            text = Path(path).read_text()
            found = results[folder][path]
            assert found["perplexity"] == pytest.approx(
                perplexity_by_hand(model, text, 5), rel=1e-6
            )
            assert found["windows"] == 5
            if folder == pruned:
                by_hand = agreement_by_hand(
                    AutoModelForCausalLM.from_pretrained(dense), model, text, 5
                )
                assert found.items() >= by_hand.items()
            else:
                assert "same_top" not in found
        for name in ("arc_easy", "boolq"):
            by_hand = accuracies_by_hand(model, tiny_tokenizer(), name, DOCUMENTS[name])
            assert results[folder][name]["acc"] == by_hand["acc"]
            change = results[folder][name]["acc"] - results[dense][name]["acc"]
            if folder == pruned:
                flips = results[folder][name]
                assert change == flips["wrong_to_right"] - flips["right_to_wrong"]

    out = capsys.readouterr().out
    before = results[dense][texts[0]]["perplexity"]
    after = results[pruned][texts[0]]["perplexity"]
    error = results[pruned][texts[0]]["perplexity_stderr"]
    assert f"{after:.2f} ± {error:.2f} ({after - before:+.2f})" in out
    for heading in ("arc_easy acc_norm ", "boolq acc ", "mean acc "):
        assert heading in out


def test_only_one_model_is_in_memory(side_by_side, monkeypatch):
    loaded = []

    def load(*arguments, **options):
        assert all(model() is None for model in loaded)
        module = CausalLMModule(*arguments, **options)
        loaded.append(weakref.ref(module.model))
        return module

    monkeypatch.setattr("wanda_lightning.cli.model_and_data.CausalLMModule", load)
    assert run(*side_by_side) == 0
    assert len(loaded) == 2


def test_zeros_of_a_model_quantized_by_torchao(stored):
    from torchao.quantization import Int8WeightOnlyConfig  # slow to import

    method = TorchAoConfig(Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(stored / "pruned", quantization_config=method)
    layers = [module for name, module in model.named_modules() if name.endswith("proj")]
    zeros = torch.cat([layer.weight.dequantize().flatten() == 0 for layer in layers])
    assert zeros.sum() >= 1024
    assert sparsity_of(model)["layers"] == int(zeros.sum()) / len(zeros)


@torch.no_grad()
def accuracies_of_images(model, images):
    """The shares of images whose label is among the first output, and the first five."""
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model.eval()))
    paths = sorted(images.glob("*/*"))
    logits = model(torch.stack([transform(Image.open(path)) for path in paths]))
    labels = torch.tensor([int(path.parent.name) for path in paths])
    is_label = logits.argsort(descending=True) == labels[:, None]
    results = {"images": 24}
    for name, places in (("top-1", 1), ("top-5", 5)):
        share = is_label[:, :places].any(dim=1).double().mean().item()
        results[name] = pytest.approx(share)
        results[f"{name}_stderr"] = pytest.approx((share * (1 - share) / 24) ** 0.5)
    return results


def test_image_classifiers_side_by_side(stored, capsys):
    names = [f"local-dir:{stored}/vit{number}" for number in (1, 2)]
    models = [timm.create_model(name, pretrained=True) for name in names]
    save_file(models[1].state_dict(), "weights.safetensors")
    name = f"timm:{names[0]}"
    options = (
        f"--model {name} --dense {name} --checkpoint weights.safetensors --data {stored}/images"
    )
    assert run("evaluate", *options.split(), "--batch_size", 5, "--save", "results.json") == 0
    assert "top-5" in capsys.readouterr().out
    found = read_json("results.json")["models"]
    assert list(found) == [name, f"{name} weights.safetensors"]
    for results, model in zip(found.values(), models, strict=True):
        by_hand = accuracies_of_images(model, stored / "images")
        assert results[f"{stored}/images"].items() >= by_hand.items()
        assert results["sparsity"] == {"layers": 0.0, "model": sparsity_of(model)["model"]}
    assert found[f"{name} weights.safetensors"][f"{stored}/images"]["kl_divergence"] > 0


# Options, and what is said about them.
REFUSED = """
--tasks rte,boolq --tasks_dir INPUTS -> does not have rte.jsonl, boolq.jsonl
--tasks boolq -> cannot be downloaded from the Hugging Face hub. Put them into a file: --tasks_dir DIR, with
--tasks boolq --tasks_dir INPUTS/tasks --apply_chat_template -> has none. Leave the option out
--num_fewshot 2 -> --num_fewshot must be left out for a command without tasks
--dense INPUTS/images -> key in its config.json
--model other -> but other splits
--model wide -> has 400 tokens and wide has 480. Leave --dense out
--model mute -> tokenizer must be given
--model bin -> the only format that is read, but bin has config.json, pytorch_model.bin. Convert a
"""


@pytest.mark.parametrize("case", REFUSED.strip().splitlines())
def test_refused_before_anything_is_measured(stored, side_by_side, refused, monkeypatch, case):
    for function in ("measure", "answer"):
        monkeypatch.setattr(f"wanda_lightning.cli.evaluate_command.{function}", None)
    for name in ("other", "mute", "wide"):
        tiny_llama(0).save_pretrained(name)
    config = tiny_llama(0).config
    config.vocab_size = 480
    config.save_pretrained("wide")
    tiny_tokenizer().save_pretrained("wide")
    byte_tokenizer().save_pretrained("other")
    tiny_llama(0).config.save_pretrained("bin")
    Path("bin/pytorch_model.bin").touch()
    options, message = case.replace("INPUTS", str(stored)).split(" -> ")
    refused(*side_by_side, *options.split(), message=message)


@pytest.fixture
def prune_and_ask(stored, inputs):
    """The options of a fast pruning, after which the paper's tasks are measured."""
    return f"""
    prune --model {stored}/dense --calibration {inputs}/long.txt --evaluation {inputs}/long.txt --num_samples 4
    --seqlen {SEQLEN} --limit 2 --eval_zero_shot --tasks_dir {stored}/tasks --save log --save_model model
    """.split()


def test_all_is_saved_before_the_tasks(prune_and_ask, monkeypatch):
    fails = iter([False, True])  # the dense model answers first

    def answer(*_):
        return os.stat("gone") if next(fails) else ({}, {})

    monkeypatch.setattr("wanda_lightning.cli.run_job.answer", answer)
    assert run(*prune_and_ask) == 2
    assert read_json("log/pruning_report.json")["run"]["after"] > 1
    assert sparsity_of(AutoModelForCausalLM.from_pretrained("model"))["layers"] == 0.5


def test_zero_shot_after_pruning(prune_and_ask, capsys):
    assert run(*prune_and_ask) == 0
    out = capsys.readouterr().out
    written = read_json("log/pruning_report.json")["run"]
    measured = written["zero_shot"]
    assert list(measured) == list(written["dense_zero_shot"]) == [*PAPER_TASKS, "mean"]
    pruned = AutoModelForCausalLM.from_pretrained("model")
    assert sparsity_of(pruned)["layers"] == 0.5
    for name in {*PAPER_TASKS} - {"hellaswag", "winogrande"}:  # their prompts are not made by hand
        by_hand = accuracies_by_hand(pruned, tiny_tokenizer(), name, DOCUMENTS[name])
        assert measured[name]["acc"] == by_hand["acc"]
        changed = measured[name]["wrong_to_right"] - measured[name]["right_to_wrong"]
        assert changed == pytest.approx(by_hand["acc"] - written["dense_zero_shot"][name]["acc"])
        assert f"{name} acc " in out
    assert f"{measured['mean']['acc']:.2%}" in out
    assert AutoTokenizer.from_pretrained("model").pad_token is None
