"""NaN, infinity and overflow are found on every device."""

import pytest
import torch
from support.elsewhere import Elsewhere

from wanda_lightning.calibration.reader import Check, refuse_nonfinite
from wanda_lightning.parallel import SINGLE_PROCESS


def check(layer, finite, elsewhere=False):
    flag = torch.tensor(finite)
    return Check([layer], 0, flag.as_subclass(Elsewhere) if elsewhere else flag)


def test_flags_of_several_devices_are_read():
    with pytest.raises(RuntimeError, match="same device"):
        torch.stack([check("a", True).finite, check("b", True, elsewhere=True).finite])
    refuse_nonfinite([check("a", True), check("b", True, elsewhere=True), check("c", True)], SINGLE_PROCESS)
    for bad, elsewhere in (("b", True), ("c", False)):
        checks = [check("a", True, elsewhere=not elsewhere), check(bad, False, elsewhere)]
        with pytest.raises(ValueError, match=f"the input of {bad} holds NaN or infinity"):
            refuse_nonfinite(checks, SINGLE_PROCESS)
