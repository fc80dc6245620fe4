"""NaN, infinity and overflow are found on every device, and their place is named."""

import pytest
import torch
from support.elsewhere import Elsewhere

from wanda_lightning.calibration.nonfinite import Check, refuse_nonfinite, token_to_report
from wanda_lightning.parallel import SINGLE_PROCESS


def check(layer, finite, elsewhere=False):
    flag = torch.tensor(finite)
    return Check([layer], 0, flag.as_subclass(Elsewhere) if elsewhere else flag, torch.tensor(1), (2,), None)


def test_flags_of_several_devices_are_read():
    with pytest.raises(RuntimeError, match="same device"):
        torch.stack([check("a", True).finite, check("b", True, elsewhere=True).finite])
    refuse_nonfinite([check("a", True), check("b", True, elsewhere=True), check("c", True)], SINGLE_PROCESS)
    for bad, elsewhere in (("b", True), ("c", False)):
        checks = [check("a", True, elsewhere=not elsewhere), check(bad, False, elsewhere)]
        with pytest.raises(ValueError, match=f"the input of {bad} holds NaN or infinity.*at row 1"):
            refuse_nonfinite(checks, SINGLE_PROCESS)


@pytest.mark.parametrize(("device", "finite", "row"), [("cpu", True, 0), ("cpu", False, 1), ("meta", True, 1)])
def test_the_token_is_looked_for_unless_a_cpu_knows_that_there_is_none(device, finite, row):
    flag, tokens = torch.tensor(finite, device=device), torch.tensor([[1.0], [-3.0]])
    assert token_to_report(flag, lambda: tokens) == row
