"""SIGTERM and SIGHUP end a command within a step, and leave nothing behind."""

import os
import signal
import time
from importlib import import_module

import pytest
from support.cli import IGNORED_WARNINGS, everything_in
from support.forks import Fork, shell

from wanda_lightning.cli.signals import Signals

pytestmark = IGNORED_WARNINGS


def slowed(path, method, *arguments):
    """Be a command in which a method sleeps from its third call on."""
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
    shell(*arguments)


CASES = {
    "prune": (signal.SIGHUP, 129, "wanda_lightning.core.solvers.ZeroOut", "__call__"),
    "finetune": (signal.SIGTERM, 143, "wanda_lightning.modules.CausalLMModule", "training_step"),
}


@pytest.mark.parametrize("command", CASES)
def test_a_signal_ends_a_command(command, inputs, text, pruned, tmp_path):
    number, status, *where = CASES[command]
    arguments = [*text, "--save", "out", "--save_model", "model"]
    if command == "finetune":  # the Trainer has a handler of its own
        texts = ["--data", inputs / "long.txt", "--evaluation", inputs / "other.txt", "--limit", "1", "--seqlen", "32"]
        arguments = ["finetune", "--model", pruned, *texts, "--steps", "20", "--save_model", "tuned"]
    before = everything_in(tmp_path)
    fork = Fork(slowed, *where, *map(str, arguments))
    assert any("in the middle" in line for line in fork.stdout)
    fork.send_signal(number)
    ended = fork.wait()
    assert ended.returncode == status
    assert f"wanda-lightning: ended by {number.name}. Unfinished files were removed." in ended.stderr
    assert "Traceback" not in ended.stderr
    has_progress = (tmp_path / "tuned.ckpt").exists()
    assert ("The same command continues from " in ended.stdout) == has_progress == (command == "finetune")
    (tmp_path / "tuned.ckpt").unlink(missing_ok=True)
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
