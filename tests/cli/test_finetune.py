"""`wanda-lightning finetune`: zeros stay, and perplexity is measured again by hand."""

import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from support import forks
from support.cli import IGNORED_WARNINGS, SEQLEN, perplexity_by_hand, run, zeros_by_layer
from support.forks import shell
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from wanda_lightning.modules import causal_lm, loading

pytestmark = IGNORED_WARNINGS


@pytest.fixture
def tuned(pruned, inputs):
    """The options of a fast run on the language model, pruned."""
    texts = ["--data", inputs / "long.txt", "--evaluation", inputs / "other.txt", "--limit", "6"]
    sizes = ["--steps", "3", "--batch_size", "2", "--seqlen", SEQLEN, "--lr", "0.01"]
    return ["finetune", "--model", pruned, *texts, *sizes]


@pytest.mark.parametrize(
    ("method", "targets"),
    [
        ("full", None),
        ("keep-zeros-lora", "all-linear"),
        ("lora", None),
        pytest.param("keep-zeros-lora", None, marks=pytest.mark.nightly),
    ],
)
def test_fine_tuning_keeps_every_zero(tuned, inputs, capsys, method, targets):
    more = ["--target_modules", targets] if targets else []
    assert run(*tuned, "--method", method, *more, "--dense", inputs / "llama", "--save_model", "tuned") == 0
    dense, pruned, new = (AutoModelForCausalLM.from_pretrained(f) for f in (inputs / "llama", "pruned", "tuned"))
    before, after = zeros_by_layer(pruned), zeros_by_layer(new)
    assert all(torch.equal(before[name], after[name]) for name in before)
    trained = [name for name, weight in new.state_dict().items() if not torch.equal(weight, pruned.state_dict()[name])]
    adapted = [f"{name}.weight" for name in before if targets or name.endswith(("q_proj", "v_proj"))]
    assert trained == (list(new.state_dict()) if method == "full" else adapted)
    printed = capsys.readouterr().out
    other = (inputs / "other.txt").read_text()
    for name, model in {"dense": dense, "pruned": pruned, "fine-tuned": new}.items():
        assert f"│ {name:<{26 if method == 'lora' else 10}} │ {perplexity_by_hand(model, other, 6):10.2f} │" in printed
    zeros = sum(int(where.sum()) for where in before.values())
    assert f"Zeros before: {zeros:,}, after: {zeros:,}." in printed


@pytest.mark.parametrize("method", [pytest.param("full", marks=pytest.mark.nightly), "keep-zeros-lora"])
def test_learning_from_the_dense_model(tuned, inputs, monkeypatch, method):
    loaded = []
    load = loading.load_causal_lm
    monkeypatch.setattr(
        causal_lm, "load_causal_lm", lambda source, *args, **kw: loaded.append(str(source)) or load(source, *args, **kw)
    )
    options = ["--method", method, "--dense", inputs / "llama", "--steps", "20"]
    assert run(*tuned, *options, "--save_model", "plain") == 0
    loaded.clear()
    assert run(*tuned, *options, "--distill", "--save_model", "tuned") == 0
    assert sorted(loaded) == sorted(["pruned", str(inputs / "llama")])  # each once
    names = inputs / "llama", "pruned", "plain", "tuned"
    dense, pruned, plain, new = (AutoModelForCausalLM.from_pretrained(name) for name in names)
    before, after = zeros_by_layer(pruned), zeros_by_layer(new)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert divergence(new, dense, inputs) < divergence(plain, dense, inputs)


@torch.no_grad()
def divergence(model, dense, inputs):
    ids = torch.tensor(list((inputs / "long.txt").read_bytes()[: 8 * SEQLEN])).view(8, SEQLEN)
    log_q, log_p = (each(ids).logits.log_softmax(-1) for each in (model, dense))
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True).item()


def test_all_weights_of_a_model_in_16_bits_train_in_float32(tuned):
    AutoModelForCausalLM.from_pretrained("pruned", dtype=torch.bfloat16).save_pretrained("pruned")
    assert run(*tuned, "--lr", "1e-6", "--method", "full", "--save_model", "tuned") == 0
    pruned, new = AutoModelForCausalLM.from_pretrained("pruned"), AutoModelForCausalLM.from_pretrained("tuned")
    assert (pruned.dtype, new.dtype) == (torch.bfloat16, torch.float32)
    before, after = zeros_by_layer(pruned), zeros_by_layer(new)
    for name in before:
        assert torch.equal(before[name], after[name])
        assert not torch.equal(pruned.get_submodule(name).weight.float(), new.get_submodule(name).weight)


def killed(at, *arguments):
    """Be a command that kills itself before a step."""
    step = causal_lm.CausalLMModule.training_step

    def training_step(module, batch, batch_idx):
        if module.trainer.global_step == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(module, batch, batch_idx)

    causal_lm.CausalLMModule.training_step = training_step
    shell(*arguments)


@pytest.mark.parametrize("method", ["full", pytest.param("keep-zeros-lora", marks=pytest.mark.nightly)])
def test_a_killed_command_that_is_repeated_equals_an_uninterrupted_one(tuned, capsys, monkeypatch, method):
    options = ["--method", method, "--steps", "24", *(["--lora_dropout", "0"] if method != "full" else [])]
    assert run(*tuned, *options, "--save_model", "whole") == 0
    command = [*tuned, *options, "--save_model", "tuned"]
    assert forks.run(killed, 15, *map(str, command)).returncode == -signal.SIGKILL
    Path("other.ckpt").write_bytes(b"not by finetune")
    for folder, more in (("tuned", ["--seed", "1"]), ("other", ["--save_model", "other"])):
        before = Path(f"{folder}.ckpt").read_bytes()
        assert run(*command, *more) == 1
        assert f"--save_model {folder} has a checkpoint of another command" in capsys.readouterr().err
        assert Path(f"{folder}.ckpt").read_bytes() == before
    Path("other.ckpt").unlink()
    steps, step = [], causal_lm.CausalLMModule.training_step
    count = lambda module, batch, index: (steps.append(module.trainer.global_step), step(module, batch, index))[1]  # noqa: E731
    monkeypatch.setattr(causal_lm.CausalLMModule, "training_step", count)
    assert run(*command) == 0
    assert steps == list(range(15, 24))
    assert "Training continues from" in capsys.readouterr().out
    whole, new = (AutoModelForCausalLM.from_pretrained(name).state_dict() for name in ("whole", "tuned"))
    assert all(torch.equal(new[name], weight) for name, weight in whole.items())
    assert not list(Path().glob("*.ckpt"))


@pytest.mark.nightly
def test_two_devices_take_twice_the_windows_in_a_step(tuned, capsys):
    assert run(*tuned, "--devices", "2", "--batch_size", "1", "--method", "full", "--save_model", "two") == 0
    assert "3 steps in" in capsys.readouterr().out
    assert run(*tuned, "--batch_size", "2", "--method", "full", "--save_model", "one") == 0
    pruned, one, two = (AutoModelForCausalLM.from_pretrained(name).state_dict() for name in ("pruned", "one", "two"))
    for name, weight in two.items():
        assert not torch.equal(weight, pruned[name])
        assert torch.equal(weight == 0, one[name] == 0)


def unavailable(**options):
    raise MisconfigurationException(f"You requested gpu: {options['devices']}")


def test_what_cannot_be_fine_tuned(tuned, inputs, refused, monkeypatch):
    refused(*tuned, "--model", inputs / "llama", message="has no zeros to keep. Prune it first")
    refused(*tuned, "--distill", message="--distill learns from the dense model, but none is given", code=2)
    refused(*tuned, "--distill", "--dense", "pruned", message="but --dense is the pruned one, pruned", code=2)
    refused(*tuned, "--seqlen", "65", message="--seqlen must be at most 64, the model's context, but it is 65", code=2)
    refused(*tuned, "--target_modules", "no_such", message="no_such")
    refused(*tuned, "--save_model", inputs, message=f"--save_model {inputs} exists and is not empty", code=2)
    with monkeypatch.context() as patched:  # devices that this machine does not have, before anything is measured
        patched.setattr("wanda_lightning.cli.finetune.measure", None)
        patched.setattr("lightning.Trainer", unavailable)
        refused(*tuned, "--devices", "64", message="error: You requested gpu: 64")
    monkeypatch.setitem(sys.modules, "peft", None)
    refused(*tuned, message="error: Adapters need peft: pip install '.[lora]' in the source folder")
