"""Which errors are meant for the user, and how they are printed."""

import os

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from wanda_lightning.cli.explain import explain, refusal_in
from wanda_lightning.common.checks import check_positive
from wanda_lightning.common.words import did_you_mean


def caught(function):
    with pytest.raises(Exception) as error:  # noqa: PT011
        function()
    return error.value


def refused():
    check_positive(num_samples=0)


def wrapped():
    try:
        refused()
    except ValueError as error:
        raise RuntimeError("a library wraps it") from error


def misconfigured():
    raise MisconfigurationException("Lightning says so")


REFUSALS = {
    "a raise statement of ours": refused,
    "wrapped by a library": wrapped,
    "Lightning": misconfigured,
    "the operating system": lambda: os.stat("/gone/file"),
}
FAULTS = {
    "ours, by an operation": lambda: did_you_mean(3, ["a"]),
    "not ours": lambda: int("x"),
    "a library": lambda: torch.zeros(2).view(3),
    "a test": lambda: (_ for _ in ()).throw(ValueError("not raised by the package")),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_is_one_line(case, capsys):
    error = caught(REFUSALS[case])
    assert refusal_in(error) is not None
    explain(error, debug=False)
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"wanda-lightning: error: {refusal_in(error)}\n"
    explain(error, debug=True)
    assert capsys.readouterr().err.startswith("Traceback")


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_keeps_its_traceback(case, capsys):
    error = caught(FAULTS[case])
    assert refusal_in(error) is None
    explain(error, debug=False)
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert "internal error in wanda_lightning or in a library" in err
    assert "Please open an issue" in err


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried\nmore")])
def test_memory_that_runs_out_is_no_fault(error, capsys):
    explain(error, debug=False)
    assert capsys.readouterr().err.startswith("wanda-lightning: error: memory ran out (")
