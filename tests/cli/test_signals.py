"""SIGTERM and SIGHUP end real commands within a step, and leave nothing behind."""

import os
import signal
import subprocess
import sys
import time

import pytest
from support.cli import everything_in, run

from wanda_lightning.cli.signals import Signals

SLOWED = """
import sys, time
from importlib import import_module
from wanda_lightning.cli import main

path, method = sys.argv[1:3]
module, name = path.rsplit(".", 1)
owner, calls = getattr(import_module(module), name), []
original = getattr(owner, method)

def slowly(*arguments, **options):
    calls.append(method)
    if len(calls) == 3:
        print("in the middle", flush=True)
    if len(calls) >= 3:
        time.sleep(0.5)
    return original(*arguments, **options)

setattr(owner, method, slowly)
sys.argv[1:] = sys.argv[3:]
sys.exit(main())
"""


def end(arguments, number, where, tmp_path, prepare=""):
    """Send a signal to a real command in the middle of its work; return its status and what it said."""
    command = [sys.executable, "-c", prepare + SLOWED, *where, *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes)
    try:
        assert any("in the middle" in line for line in process.stdout)
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    return process.returncode, err


CASES = {
    "prune": (["--save", "out", "--save_model", "model"], ("wanda_lightning.core.solvers.ZeroOut", "__call__")),
    "evaluate": (["--save", "out.json"], ("wanda_lightning.modules.CausalLMModule", "validation_step")),
    "finetune": (["--save_model", "tuned"], ("wanda_lightning.modules.CausalLMModule", "training_step")),
}


@pytest.mark.parametrize(
    ("command", "number", "status"),
    [
        ("prune", signal.SIGTERM, 143),
        ("prune", signal.SIGHUP, 129),
        ("evaluate", signal.SIGTERM, 143),
        ("finetune", signal.SIGTERM, 143),
    ],
)
def test_a_signal_ends_a_command(command, number, status, inputs, text, tmp_path):
    more, where = CASES[command]
    arguments = [*text, *more]
    if command == "evaluate":
        sizes = ["--batch_size", "1", "--seqlen", "32"]
        arguments = ["evaluate", "--model", inputs / "llama", "--eval", inputs / "other.txt", *sizes, *more]
    if command == "finetune":
        assert run(*text, "--save_model", "pruned") == 0
        texts = ["--data", inputs / "long.txt", "--eval", inputs / "other.txt", "--limit", "1", "--seqlen", "32"]
        arguments = ["finetune", "--model", "pruned", *texts, "--steps", "50", *more]
    before = everything_in(tmp_path)
    code, err = end(arguments, number, where, tmp_path)
    assert code == status
    assert f"wanda-lightning: ended by {number.name}. Unfinished files were removed." in err
    assert "Traceback" not in err
    assert everything_in(tmp_path) == before


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
        assert signals.received is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_that_comes_twice_at_once_interrupts_once():
    before = signal.getsignal(signal.SIGTERM)
    cleaned = []

    def work():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
            cleaned.append(True)

    with Signals() as signals, pytest.raises(KeyboardInterrupt):
        work()
    assert signals.received == signal.SIGTERM
    assert cleaned == [True]
    assert signal.getsignal(signal.SIGTERM) == before
