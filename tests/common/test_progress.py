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
    with ProgressBar("Pruning", 4) as bar:
        bar.advance(2)  # and no more
    with pytest.raises(ZeroDivisionError), ProgressBar("Pruning", 2) as bar:
        bar.advance(1 / 0)
    for total, enabled in ((0, True), (3, False)):
        with ProgressBar("Pruning", total, enabled) as bar:
            bar.advance()
    first = " ".join(filter(None, ("Pruning 1/4", name, "(10 s, 30 s left)")))
    last = ["Pruning 4/4 done (12 s)", "Pruning 2 done (0 s)", "Pruning 0/2 stopped (0 s)"]
    assert capsys.readouterr().err.splitlines() == [first, *last]
