"""The command as a whole: help, exit statuses, interruption, errors and what is loaded when."""

import os
import re
import signal
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from support import forks
from support.cli import IGNORED_WARNINGS, OUT, everything_in, run

from wanda_lightning.cli import explain, parse_options
from wanda_lightning.common.errors import UserError

pytestmark = IGNORED_WARNINGS

LIGHT = """
import sys, wanda_lightning
print(sorted({'torch', 'lightning', 'rich', 'yaml'} & set(sys.modules)))
from wanda_lightning.cli import main
main(["--version"])
for command in ("prune", "evaluate", "inspect", "shrink", "fit"):
    main([command, "--help"])
for command in ("pruen", "prune", "prune --model gone.gguf"):
    main(command.split())
for more in ("--method wnada", "--pattern 4;2", "--evaluation wikitext3", "--save /dev/null/x", "--sparsity 5"):
    main(["prune", "--model", "x", *more.split()])
print({"torch", "lightning", "transformers", "timm", "datasets", "peft"} & set(sys.modules), file=sys.stderr)
assert set(wanda_lightning.__all__) <= set(dir(wanda_lightning)); wanda_lightning.nothing
"""


def test_the_package_help_and_refusals_load_no_library(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", LIGHT], capture_output=True, text=True, cwd=tmp_path
    )
    errors, _, traceback = done.stderr.partition("Traceback")
    *refusals, loaded = errors.splitlines()
    assert loaded == "set()"
    assert len(refusals) == 8  # one line for each
    assert 'Did you mean "prune"?' in refusals[0]
    assert traceback.endswith(
        "AttributeError: module 'wanda_lightning' has no attribute 'nothing'\n"
    )

    assert done.stdout.startswith(
        f"[]\nwanda_lightning {version('wanda_lightning')}\nUsage: wanda-lightning"
    )
    assert done.stdout.count("Usage: wanda-lightning") == 5
    for group in ("Model", "Pruning", "Data", "Results", "Session"):
        assert f"─ {group} ─" in done.stdout
    assert "Fraction of the pruned layers' weights that become" in " ".join(
        done.stdout.replace("│", "").split()
    )


@pytest.mark.parametrize("command", ["prune", "shrink"])
def test_help_lists_what_most_runs_need_and_help_all_the_rest(command):
    # In processes of their own, since the arguments are read at import.
    options = []
    for flag in ("--help", "--help_all"):
        program = [sys.executable, "-m", "wanda_lightning", command, flag]
        shown = subprocess.run(program, capture_output=True, text=True, check=True).stdout
        assert "COMMAND --help_all also lists" in shown
        # An option may have several names, of which the first begins its line.
        options.append(set(re.findall(r"^│ (?:   |\*  MODEL )?--(\w+)", shown, re.MULTILINE)))
    usual, every = options
    assert {"model", "calibration", "save_model", "config"} < usual < every
    assert len(usual) <= 25
    assert every == parse_options(command, ["x"]).keys() | {"config", "print_config", "debug"}


def test_waiting_threads_leave_the_cores_to_others_and_bars_stay_out_of_files(monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    run("--version")
    assert os.environ == {"GOMP_SPINCOUNT": "2000", "KMP_BLOCKTIME": "0", "TQDM_DISABLE": "1"}


def test_ctrl_c(monkeypatch, capsys):
    monkeypatch.setattr("wanda_lightning.cli._run", lambda _: signal.raise_signal(signal.SIGINT))
    assert run("prune") == 130
    assert capsys.readouterr().err == "wanda-lightning: interrupted\n"


CLOSED_PIPE = """
import os, runpy, sys
os.chdir(sys.argv.pop(1))
reading, writing = os.pipe()
os.close(reading)
os.dup2(writing, 1)
sys.stdout = os.fdopen(1, "w", closefd=False)
runpy.run_module("wanda_lightning", run_name="__main__")
"""


@forks.IN_ONE_WORKER
def test_a_closed_pipe_still_saves(text, tmp_path):
    done = forks.run(forks.execute, CLOSED_PIPE, tmp_path, *text, *OUT)
    assert done.returncode != 0
    assert {"pruning_report.json", "model/model.safetensors", "model/README.md"} <= everything_in(
        tmp_path / "out"
    ).keys()


WRAPPED = RuntimeError("a library wraps it")
WRAPPED.__cause__ = UserError("num_samples must be")
ERRORS = [
    (WRAPPED, "num_samples must be"),
    (MisconfigurationException("Lightning says so"), "Lightning says so"),
    (RuntimeError("No space left (os error 28)"), "No space left"),
    (
        FileNotFoundError(2, "No such file or directory", "/gone/file"),
        "No such file or directory: '/gone/file'",
    ),
    (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"), "can't decode byte 0xff"),
]


@pytest.mark.parametrize(("error", "message"), ERRORS)
def test_a_refusal_is_one_line_without_debug(error, message, capsys):
    assert explain(error, debug=False) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("wanda-lightning: error: ")
    assert message in line

    explain(error, debug=True)  # shows the traceback
    assert "wanda-lightning: error: " not in capsys.readouterr().err.partition("\n")[0]


def test_lack_of_memory_is_one_line_and_status_1(capsys):
    assert explain(torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), debug=False) == 1
    line = "memory ran out (CUDA out of memory. Tried). Use smaller batches, fewer samples or shorter windows."
    assert capsys.readouterr().err == f"wanda-lightning: error: {line}\n"


def test_a_fault_keeps_its_traceback(capsys):
    assert explain(ValueError("a fault"), debug=False) == 1
    first, last = capsys.readouterr().err.splitlines()
    assert first == "ValueError: a fault"
    assert "Please open an issue" in last
