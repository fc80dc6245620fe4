"""NaN, infinity and overflow are found on every device, and their place is named."""

import re

import pytest
import torch
from support.elsewhere import Elsewhere
from torch import nn

from wanda_lightning import prune
from wanda_lightning.calibration.nonfinite import Check, largest_token, refuse_nonfinite, token_to_report
from wanda_lightning.parallel import SINGLE_PROCESS


def check(layer, finite, elsewhere=False):
    flag = torch.tensor(finite)
    row = largest_token(torch.tensor([[1.0], [-3.0]]))
    return Check([layer], 0, flag.as_subclass(Elsewhere) if elsewhere else flag, row, (2,), None)


def test_flags_of_several_devices_are_read():
    with pytest.raises(RuntimeError, match="same device"):
        torch.stack([check("a", True).finite, check("b", True, elsewhere=True).finite])
    refuse_nonfinite([check("a", True), check("b", True, elsewhere=True), check("c", True)], SINGLE_PROCESS)
    for bad, elsewhere in (("b", True), ("c", False)):
        checks = [check("a", True, elsewhere=not elsewhere), check(bad, False, elsewhere)]
        with pytest.raises(ValueError, match=f"the input of {bad} holds NaN or infinity.*at row 1"):
            refuse_nonfinite(checks, SINGLE_PROCESS)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("sequential", ["block", "layer", "none"])
def test_sample_and_token_are_named(bad, sequential):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    batches = [torch.randn(3, 5, 4) for _ in range(3)]
    batches[1][2, 4, 0] = bad
    text = "the input of 0 holds NaN or infinity, or its squares overflow float32, in calibration batch 1 (counted"
    with pytest.raises(ValueError, match=rf"{re.escape(text)}.*at sample 2, token 4\."):
        prune(model, batches, sequential=sequential, progress=False)


@pytest.mark.parametrize(("device", "finite", "row"), [("cpu", True, 0), ("cpu", False, 1), ("meta", True, 1)])
def test_the_token_is_looked_for_unless_a_cpu_knows_that_there_is_none(device, finite, row):
    flag, tokens = torch.tensor(finite, device=device), torch.tensor([[1.0], [-3.0]])
    assert token_to_report(flag, lambda: tokens) == row


def test_the_place_counts_what_was_left_out():
    tokens, keep = torch.tensor([[1.0], [float("nan")], [2.0]]), torch.tensor([[False, True], [True, True]])
    check = Check(["a"], 0, torch.tensor(False), largest_token(tokens), (2, 2), keep)
    assert check.place == "sample 1, token 0"
