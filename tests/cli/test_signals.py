"""SIGTERM and SIGHUP end a command within a step, and leave nothing behind."""

import os
import signal
import time

import pytest
from support.cli import IGNORED_WARNINGS, everything_in
from support.forks import Fork, shell

from wanda_lightning.cli.signals import Signals
from wanda_lightning.modules import CausalLMModule

pytestmark = IGNORED_WARNINGS


def slowed(*arguments):
    """Be a command whose training sleeps from its third step on."""
    step = CausalLMModule.training_step

    def slowly(module, *batch):
        if module.trainer.global_step >= 2:
            print("in the middle", flush=True)
            time.sleep(0.5)
        return step(module, *batch)

    CausalLMModule.training_step = slowly
    shell(*arguments)


def test_a_signal_ends_a_training(inputs, pruned, tmp_path):
    """The Trainer has a handler of its own."""
    texts = ["--data", inputs / "long.txt", "--evaluation", inputs / "other.txt", "--limit", "1", "--seqlen", "32"]
    before = everything_in(tmp_path)
    command = ["finetune", "--model", pruned, *texts, "--steps", "20", "--save_model", "tuned"]
    fork = Fork(slowed, *map(str, command))
    assert any("in the middle" in line for line in fork.stdout)
    fork.send_signal(signal.SIGTERM)
    ended = fork.wait()
    assert ended.returncode == 143
    assert "wanda-lightning: ended by SIGTERM. Unfinished files were removed." in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "The same command continues from " in ended.stdout
    (tmp_path / "tuned.ckpt").unlink()
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
