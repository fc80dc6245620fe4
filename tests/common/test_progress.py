"""A bar on a terminal, plain lines elsewhere."""

import io
import sys

import pytest

from wanda_lightning.common import progress
from wanda_lightning.common.progress import ProgressBar


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test advances."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize("name", ["", "model.layers.0.self_attn.q_proj"])
def test_lines_where_there_is_no_terminal(capsys, clock, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "20")
    with ProgressBar("Pruning", 4) as bar:
        bar.show(name)  # too early
        clock[0] += 10
        bar.advance()
        bar.show(name)
        bar.advance(3)
        clock[0] += 2
    middle = " ".join(filter(None, ("Pruning 1/4", name, "(10 s, 30 s left)")))
    assert capsys.readouterr().err.splitlines() == [middle, "Pruning 4/4 done (12 s)"]


def test_nothing_is_left_after_the_end(capsys, clock):
    with ProgressBar("Pruning", 4) as bar:
        bar.advance(2)
        clock[0] += 96
    stopped = ProgressBar("Pruning", 2)
    stopped.advance()
    clock[0] += 3
    stopped.__exit__(KeyboardInterrupt)
    assert capsys.readouterr().err.splitlines() == ["Pruning 2 done (96 s)", "Pruning 1/2 stopped (3 s)"]


@pytest.mark.parametrize(("total", "enabled"), [(0, True), (3, False)])
def test_nothing_to_show(capsys, total, enabled):
    with ProgressBar("Pruning", total, enabled) as bar:
        bar.advance()
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal(monkeypatch):
    class Terminal(io.TextIOWrapper):
        def isatty(self):
            return True

    shown = Terminal(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setenv("TERM", "xterm")
    with ProgressBar("Pruning", 4) as bar:  # fewer steps are needed
        bar.show("blocks.0")
        bar.advance(2)
    assert b"Pruning blocks.0" in shown.buffer.getvalue()
    assert b"2/2" in shown.buffer.getvalue()
