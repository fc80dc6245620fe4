"""The command as a whole: help, usage, exit statuses, interruption."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.cli import OUT, everything_in, run
from transformers import LlamaForCausalLM

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # they would only slow down these tests
    pytest.mark.filterwarnings("ignore:.*tells .* apart"),  # tiny classifiers are made without regard to the images
    pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning"),  # a log of three steps
]

COMMANDS = ["prune", "finetune", "evaluate", "inspect", "fit", "validate", "test", "predict"]


USAGE = [
    (["prune"], "--model is required"),
    (["inspect"], "--model is required"),
    (["evaluate"], "--model is required"),
    (["fit"], "required"),
    (["prune", "--model", "x", "--sparsity_ratio", "half"], "half"),
    (["prune", "--model", "x", "--prune_method", "luck"], "luck"),
    (["prune", "--model", "x", "--sequential", "row"], "row"),
    (["prune", "--model", "x", "--prune_granularity", "model"], "model"),
    (["prune", "--model", "x", "--colour", "red"], "--colour is not an option of prune."),
    (["prune", "--config", "gone.yaml"], "gone.yaml"),
    (["validate", "--config", "gone.yaml"], "gone.yaml"),
    (["pruen"], "there is no command 'pruen'"),
]


@pytest.mark.parametrize(("arguments", "message"), USAGE, ids=[" ".join(arguments) for arguments, _ in USAGE])
def test_wrong_usage_is_exit_2(refused, arguments, message):
    refused(*arguments, message=message, code=2)


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


def test_an_unknown_option_in_a_file(refused):
    Path("recipe.yaml").write_text("modle: x\n")
    refused("prune", "--config", "recipe.yaml", message="modle", code=2)
