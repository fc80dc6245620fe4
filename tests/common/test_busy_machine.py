"""The warning about threads that spin while other programs need the cores."""

import os

import pytest
import torch

from wanda_lightning import ImageClassifierModule
from wanda_lightning.common import busy_machine
from wanda_lightning.common.busy_machine import OPENMP_WAITING, is_busy
from wanda_lightning.common.progress import ProgressBar


@pytest.fixture
def busy(monkeypatch):
    """A machine where other programs have used all cores in the last minute."""
    monkeypatch.setattr(os, "getloadavg", lambda: (10.0 * os.cpu_count(), 0.0, 0.0))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for name in OPENMP_WAITING:
        monkeypatch.delenv(name, raising=False)
    busy_machine._warn.cache_clear()
    yield
    busy_machine._warn.cache_clear()


def prune_a_block():
    with ProgressBar("Pruning", 1, enabled=False) as bar:
        bar.advance()


def test_the_warning_names_the_variable_and_appears_once(busy, caplog):
    prune_a_block()
    prune_a_block()
    (record,) = caplog.records
    assert "the machine is busy: other programs use most of its cores" in record.message
    assert "Set OMP_WAIT_POLICY=passive before Python starts" in record.message


def test_the_warning_comes_with_the_model_before_it_runs(busy, caplog):
    ImageClassifierModule("test_vit", pretrained=False)
    assert "the machine is busy" in caplog.text


@pytest.mark.parametrize("name", sorted(OPENMP_WAITING))
def test_no_warning_if_a_variable_is_set(busy, caplog, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    prune_a_block()
    assert not caplog.records


def test_no_warning_if_there_is_one_thread(busy, caplog, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    prune_a_block()
    assert not caplog.records


@pytest.mark.parametrize(
    ("load", "own_seconds", "expected"),
    [
        (0.4, 0, False),  # an idle machine
        (2.5, 10, True),  # two other programs, and this one has just begun
        (2.0, 120, False),  # only this process, on both cores
        (4.0, 9999, True),  # this process on both cores, and two others
    ],
)
def test_busy_means_that_others_use_the_cores(load, own_seconds, expected, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert is_busy(load, own_seconds) == expected
