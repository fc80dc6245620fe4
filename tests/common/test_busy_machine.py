"""The warning about threads that spin while other programs need the cores."""

import pytest
import torch

from wanda_lightning.common import busy_machine
from wanda_lightning.common.busy_machine import OPENMP_WAITING, is_busy
from wanda_lightning.common.progress import ProgressBar


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test advances, on a machine where the thread waits for a core for 0.8 of each second."""
    now = [100.0]
    monkeypatch.setattr(busy_machine.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(busy_machine, "_seconds_waiting", lambda: 0.8 * now[0])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for name in OPENMP_WAITING:
        monkeypatch.delenv(name, raising=False)
    busy_machine._warn.cache_clear()
    yield now
    busy_machine._warn.cache_clear()


def prune_three_blocks(clock):
    with ProgressBar("Pruning", 3, enabled=False) as bar:
        for _ in range(3):
            clock[0] += 20
            bar.advance()


def test_the_warning_names_the_variable_and_appears_once(clock, caplog):
    prune_three_blocks(clock)
    prune_three_blocks(clock)
    (record,) = caplog.records
    assert (
        "the machine is busy: this thread spends most of its time waiting for a core"
        in record.message
    )
    assert "Set OMP_WAIT_POLICY=passive before Python starts" in record.message


@pytest.mark.parametrize("name", sorted(OPENMP_WAITING))
def test_no_warning_if_a_variable_is_set(clock, caplog, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    prune_three_blocks(clock)
    assert not caplog.records


def test_no_warning_if_there_is_one_thread(clock, caplog, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    prune_three_blocks(clock)
    assert not caplog.records


# The fractions were measured on two cores, when Wanda pruned a small Llama.
@pytest.mark.parametrize(
    ("seconds", "fraction", "expected"),
    [
        (20, 0.86, True),  # more programs than cores
        (20, 0.64, True),  # as many programs as cores
        (20, 0.05, False),  # no other program
        (
            20,
            0.01,
            False,
        ),  # no other program, and the batches come slowly: 7 times the processor time
        (5, 0.86, False),  # too short to say
    ],
)
def test_busy_means_waiting_for_a_core_most_of_the_time(seconds, fraction, expected):
    assert is_busy(seconds, fraction * seconds) == expected


def test_the_time_without_a_core_is_the_second_number_of_linux(monkeypatch, tmp_path):
    monkeypatch.setattr(busy_machine, "_SCHEDULED", tmp_path / "schedstat")
    # 5 s on a core, 3 s without one.
    (tmp_path / "schedstat").write_text("5000000000 3000000000 7\n")
    assert busy_machine._seconds_waiting() == 3
