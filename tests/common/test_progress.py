"""Plain lines, where there is no terminal."""

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
    first = " ".join(filter(None, ("Pruning 1/4", name, "(10 s, 30 s left)")))
    assert lines(capsys) == [first, "Pruning 4/4 done (12 s)"]


def test_the_last_line_of_a_task_that_needed_fewer_steps(capsys, clock):
    with ProgressBar("Pruning", 4) as bar:
        bar.advance(2)
    assert lines(capsys) == ["Pruning 2/2 done (0 s)"]


def test_the_last_line_of_a_task_that_failed(capsys, clock):
    with pytest.raises(ZeroDivisionError), ProgressBar("Pruning", 2) as bar:
        bar.advance(1 / 0)
    assert lines(capsys) == ["Pruning 0/2 stopped (0 s)"]


@pytest.mark.parametrize(("total", "enabled"), [(0, True), (3, False)])
def test_no_line_for_a_task_without_steps_or_one_that_is_not_shown(capsys, clock, total, enabled):
    with ProgressBar("Pruning", total, enabled) as bar:
        bar.advance()
    assert lines(capsys) == []


def lines(capsys):
    return capsys.readouterr().err.splitlines()
