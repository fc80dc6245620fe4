"""A second device for the tests of this folder, and a CPU that takes the same way as other devices."""

import pytest
import support.remote
import torch
from support.remote import connect

from wanda_lightning.core import statistics


@pytest.fixture(scope="session")
def remote():
    return connect()


@pytest.fixture(autouse=True)
def same_way(remote, monkeypatch):
    """Let the CPU use what other devices use where both have a way of their own, so that results are equal to the bit.

    These are the sum of squares in parts, fused attention, and distillation in bfloat16 where the processor has it.
    Kernels must be deterministic, as a user may ask for.
    """
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    sum_squares = statistics.SUMS["square_sum"]
    plain = {"cpu": lambda tokens: tokens.square().sum(dim=0)}
    monkeypatch.setitem(
        statistics.SUMS, "square_sum", lambda x: plain.get(x.device.type, sum_squares)(x)
    )
    fused = torch.backends.cuda.flash_sdp_enabled()
    torch.backends.cuda.enable_flash_sdp(False)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.enable_flash_sdp(fused)


@pytest.fixture
def no_float64(monkeypatch):
    """Take float64 from the device, as `mps` has none."""
    monkeypatch.setattr(support.remote, "HAS_FLOAT64", False)
