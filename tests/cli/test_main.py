"""The command as a whole: help, usage, exit statuses, interruption."""

import os
import re
import signal
import subprocess
import sys
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

import pytest
from support.cli import IGNORED_WARNINGS, OUT, everything_in, run
from support.forks import Fork, shell
from transformers import LlamaForCausalLM

import wanda_lightning
from wanda_lightning.cli import main
from wanda_lightning.cli.options import OPTIONS
from wanda_lightning.cli.signals import Signals

pytestmark = IGNORED_WARNINGS
COMMANDS = ["prune", "finetune", "evaluate", "inspect", "fit", "validate", "test", "predict"]

USAGE = [
    (["prune"], "--model is required"),
    (["fit"], "--config FILE.yaml is required for fit"),
    (["validate", "--config", "gone.yaml"], "gone.yaml"),
    (["inspect", "--model", "."], "--model . has no config.json."),
    (["pruen"], "There is no command 'pruen'. Did you mean prune?"),
]


@pytest.mark.parametrize(("arguments", "message"), USAGE, ids=[" ".join(arguments) for arguments, _ in USAGE])
def test_wrong_usage_is_exit_2(refused, arguments, message):
    refused(*arguments, message=message, code=2)


@pytest.mark.parametrize(
    ("moment", "number", "status", "said"),
    [
        ("forward", signal.SIGINT, 130, "interrupted"),
        ("forward", signal.SIGHUP, 129, "ended by SIGHUP"),
        ("save_pretrained", signal.SIGTERM, 143, "ended by SIGTERM"),
    ],
)
def test_a_signal_is_an_exit_status(text, tmp_path, capsys, monkeypatch, moment, number, status, said):
    original = getattr(LlamaForCausalLM, moment)

    def interrupted(model, *args, **kwargs):
        if moment == "save_pretrained":
            original(model, *args, **kwargs)
        os.kill(os.getpid(), number)
        return original(model, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, moment, interrupted)
    assert run(*text, *OUT) == status
    assert said in capsys.readouterr().err
    assert [path for path in everything_in(tmp_path) if path != "out"] == []


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"], *([command, "--help"] for command in COMMANDS)])
def test_help(capsys, arguments):
    assert run(*arguments) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: wanda-lightning")
    of_command = OPTIONS.get(arguments[0]) if arguments else None
    expected = [f"--{option.name}" for option in fields(of_command)] if of_command else [*COMMANDS, "--help_all"]
    assert all(each in out for each in expected)


def test_all_options_of_a_lightning_command(capsys):
    assert run("fit", "--help_all") == 0
    out = capsys.readouterr().out
    assert all(option in out for option in ("--trainer.max_epochs", "--model", "--data"))


@pytest.mark.parametrize(
    "program", [[sys.executable, "-m", "wanda_lightning"], [Path(sys.executable).with_name("wanda-lightning")]]
)
def test_the_program_in_a_real_shell(tmp_path, program):
    done = subprocess.run([*program, "--help"], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.startswith("usage: wanda-lightning COMMAND")
    assert done.stderr == ""


def test_version(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"wanda_lightning {version('wanda_lightning')}\n"


LIGHT = """
import sys
from wanda_lightning.cli import main
commands = ["prune", "finetune", "evaluate", "inspect"]
lines = [[], ["--version"], ["pruen"]] + [[c, o] for c in commands for o in ("--help", "--print_config")]
wrong = ("--method wnada", "--pattern 4:2", "--evaluation wikitext3", "--save /dev/null/x")
lines += [["prune", "--model", "x", *more.split()] for more in wrong] + [["fit"], ["fit", "--help"]]
lines += [["fit", *option] for option in (["--config", "gone.yaml"], ["-c", "gone.yml"], ["--config=gone.yaml"])]
for arguments in lines:
    main(arguments)
print({"torch", "lightning", "transformers", "timm", "datasets", "peft"} & set(sys.modules), file=sys.stderr)
"""


def test_help_and_refusals_load_no_library(tmp_path):
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, cwd=tmp_path)
    *said, loaded = done.stderr.splitlines()
    assert loaded == "set()"
    assert len(said) == 9  # one line for each refusal
    for line in said[-3:]:
        assert re.match(r"wanda-lightning: error: --config must be a YAML file, but gone\.ya?ml does not", line)
    assert done.stdout.count("usage: wanda-lightning") == 6
    assert "Fraction of the pruned layers' weights that become" in done.stdout


def test_the_package_loads_no_library(tmp_path):
    code = "import sys, wanda_lightning; print(sorted({'torch', 'lightning', 'rich', 'yaml'} & set(sys.modules)))\n"
    code += "assert set(wanda_lightning.__all__) <= set(dir(wanda_lightning)); wanda_lightning.nothing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "[]\n"
    assert done.stderr.splitlines()[-1].startswith(
        "AttributeError: module 'wanda_lightning' has no attribute 'nothing'"
    )


def test_every_public_name_is_there():
    for name in wanda_lightning.__all__:
        assert getattr(wanda_lightning, name).__name__ == name
    assert set(wanda_lightning._HOME_OF) == set(wanda_lightning.__all__)


@pytest.mark.parametrize("command", ["prune --help", "fit --config recipe.yaml"])
def test_python_without_docstrings_is_refused_before_anything_is_loaded(command, tmp_path):
    line = [sys.executable, "-OO", "-X", "importtime", "-m", "wanda_lightning", *command.split()]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    (said,) = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert "python -OO removes the docstrings" in said
    assert not re.search(r"\| +torch$", done.stderr, flags=re.MULTILINE)


def test_a_signal_after_the_work_keeps_its_status(capsys, monkeypatch):
    """When only the streams are left to be flushed."""

    def killed():
        os.kill(os.getpid(), signal.SIGTERM)

    leave = Signals.__exit__
    monkeypatch.setattr(Signals, "__exit__", lambda self, *error: killed() or leave(self, *error))
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    try:
        assert main(["--version"]) == 143
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), handlers, strict=True):
            signal.signal(number, handler)
    assert "wanda-lightning: interrupted" in capsys.readouterr().err


WATCHED = """
import sys
from importlib.abc import MetaPathFinder
from wanda_lightning.cli import main

class Watch(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == sys.argv[1]:
            print("importing", flush=True)

sys.meta_path.insert(0, Watch())
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    "library",
    ["torch._C", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("transformers", "lightning.pytorch"))],
)
def test_ctrl_c_during_the_imports(text, tmp_path, library):
    command = [sys.executable, "-c", WATCHED, library, *map(str, text), "--save", "out"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=tmp_path, **pipes)
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "wanda-lightning: interrupted" in err
    assert "Traceback" not in err
    assert everything_in(tmp_path) == {}


def test_a_closed_pipe_still_saves(text, tmp_path):
    fork = Fork(shell, *map(str, text), "--save", "out")
    fork.stdout.close()
    assert fork.wait().returncode == 141
    assert (tmp_path / "out/pruning_report.json").is_file()
