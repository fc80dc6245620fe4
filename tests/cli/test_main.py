"""The command as a whole: help, exit statuses, interruption, errors, tables and what is loaded when."""

import os
import re
import signal
import subprocess
import sys
import warnings
from importlib.metadata import version

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from rich.table import Table
from support.cli import IGNORED_WARNINGS, everything_in, run
from support.forks import Fork, shell

import wanda_lightning
from wanda_lightning.cli import explain
from wanda_lightning.cli.output import print_line, print_table, readable_output
from wanda_lightning.common.checks import check_positive

pytestmark = IGNORED_WARNINGS
COMMANDS = {"prune": "Pruning", "evaluate": "Data", "inspect": "Pruning", "shrink": "Results"}

USAGE = [
    (["prune"], 'Command "prune" parameter --model requires an argument.'),
    (["fit"], "--config FILE.yaml is required"),
    (["validate", "--config", "gone.yaml"], "gone.yaml"),
    (["pruen"], 'Unknown command "pruen". Did you mean "prune"?'),
    (["finetune", "--model", "x"], 'Unknown command "finetune".'),
]


@pytest.mark.parametrize(("arguments", "message"), USAGE, ids=[" ".join(arguments) for arguments, _ in USAGE])
def test_wrong_usage_is_exit_2(refused, arguments, message):
    refused(*arguments, message=message, code=2)


@pytest.mark.parametrize("arguments", [[], ["-h"], ["fit", "--help"], *([name, "--help"] for name in COMMANDS)])
def test_help(capsys, arguments):
    assert run(*arguments) == 0
    out = capsys.readouterr().out
    assert out.startswith("Usage: wanda-lightning")
    if arguments and arguments[0] in COMMANDS:
        assert all(f"─ {group} ─" in out for group in ("Model", COMMANDS[arguments[0]], "Session"))
    elif arguments[:1] != ["fit"]:
        assert all(f"│ {name} " in out for name in (*COMMANDS, "fit (validate, test,"))


def test_version(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"wanda_lightning {version('wanda_lightning')}\n"


LIGHT = """
import sys
from wanda_lightning.cli import main
lines = [["--version"], ["pruen"], ["--help"], *([c, "-h"] for c in ("prune", "evaluate", "inspect", "shrink"))]
wrong = ("--method wnada", "--pattern 4;2", "--evaluation wikitext3", "--save /dev/null/x", "--sparsity 5")
lines += [["prune", "--model", "x", *more.split()] for more in wrong] + [["fit"], ["fit", "--help"]]
for arguments in lines:
    main(arguments)
print({"torch", "lightning", "transformers", "timm", "datasets", "peft"} & set(sys.modules), file=sys.stderr)
"""


def test_help_and_refusals_load_no_library(tmp_path):
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, cwd=tmp_path)
    *said, loaded = done.stderr.splitlines()
    assert loaded == "set()"
    assert len(said) == 7  # one line for each refusal
    assert done.stdout.count("Usage: wanda-lightning") == 6
    assert "Fraction of the pruned layers' weights that become" in " ".join(done.stdout.replace("│", "").split())


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


@pytest.mark.parametrize("given", [None, "active"])
def test_waiting_threads_leave_the_cores_to_others(given, monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
    run("--version")
    assert os.environ["OMP_WAIT_POLICY"] == (given or "passive")


WATCHED = """
import sys
from importlib.abc import MetaPathFinder
from wanda_lightning.cli import main

class Watch(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch._C":
            print("importing", flush=True)

sys.meta_path.insert(0, Watch())
sys.exit(main(sys.argv[1:]))
"""


def test_ctrl_c_during_the_imports(text, tmp_path):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", WATCHED, *map(str, text), "--save", "out"], cwd=tmp_path, **pipes)
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "wanda-lightning: interrupted" in err
    assert "Traceback" not in err
    assert everything_in(tmp_path) == {}


def test_a_closed_pipe_still_saves(text, tmp_path):
    fork = Fork(shell, *map(str, text), "--save", "out", "--save_model", "out/model")
    fork.stdout.close()
    assert fork.wait().returncode != 0
    assert {"pruning_report.json", "model/model.safetensors", "model/README.md"} <= everything_in(
        tmp_path / "out"
    ).keys()


def wrapped():
    try:
        check_positive(num_samples=0)
    except ValueError as error:
        raise RuntimeError("a library wraps it") from error


def misconfigured():
    raise MisconfigurationException("Lightning says so")


ERRORS = [
    (lambda: check_positive(num_samples=0), "num_samples must be"),
    (wrapped, "num_samples must be"),
    (misconfigured, "Lightning says so"),
    (lambda: os.stat("/gone/file"), "No such file or directory: '/gone/file'"),
    (lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. Tried\nmore")), "memory ran out ("),
    (lambda: int("x"), None),
    (lambda: torch.zeros(2).view(3), None),
]


@pytest.mark.parametrize(("function", "message"), ERRORS)
def test_a_refusal_is_one_line_and_a_fault_keeps_its_traceback(function, message, capsys):
    with pytest.raises(Exception) as caught:  # noqa: PT011
        function()
    assert explain(caught.value, debug=False) == (2 if message and "memory" not in message else 1)
    err = capsys.readouterr().err
    assert err.startswith("Traceback" if message is None else "wanda-lightning: error: ")
    assert (message or "Please open an issue") in err
    explain(caught.value, debug=True)
    assert capsys.readouterr().err.startswith("Traceback")


RESULTS = {
    "method": "ablate_wanda_iter",
    "sparsity": "50.00%",
    "dense perplexity": "13243.37",
    "seconds to prune": "1.5",
}
LONG = {"": "sparsity of the prunable layers", "/models/of/the/laboratory/llama-2-7b-pruned-2-4": "50.00% (+50.00)"}


@pytest.mark.parametrize("width", [20, 40, 60, 80, 200])
@pytest.mark.parametrize("cells", [RESULTS, LONG])
def test_no_number_is_cut(cells, width, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    first, *numbers = cells
    made = Table(first)
    for heading in numbers:
        made.add_column(heading, justify="right", overflow="fold")
    made.add_row(*cells.values())
    print_table(made)
    out = capsys.readouterr().out
    assert all(re.search(rf"(?<![\d.]){re.escape(cells[heading])}", out) for heading in numbers)
    assert "…" not in out


def test_markup_in_lines_is_text_and_warnings_are_one_line(capsys):
    print_line("layers [bold]x[/bold]")
    with warnings.catch_warnings(), readable_output():
        text = warnings.formatwarning("num_samples is 50", UserWarning, "/a/path.py", 3)
    assert (capsys.readouterr().out, text) == (
        "layers [bold]x[/bold]\n",
        "wanda-lightning: warning: num_samples is 50\n",
    )
    assert "/a/path.py" in warnings.formatwarning("x", UserWarning, "/a/path.py", 3)
