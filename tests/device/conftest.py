"""A second device for the tests of this folder, and a CPU that takes the same way as other devices."""

from functools import partial

import pytest
import torch
from support.remote import connect

from wanda_lightning.core import statistics


@pytest.fixture(scope="session")
def remote():
    return connect()


@pytest.fixture(autouse=True)
def same_way(remote, monkeypatch):
    """Let the CPU use what other devices use where both have a way of their own, so that results are equal to the bit.

    These are the sum of squares in parts, fused attention, and fused AdamW.
    """
    sum_squares = statistics.SUMS["square_sum"]
    plain = {"cpu": lambda tokens: tokens.square().sum(dim=0)}
    monkeypatch.setitem(statistics.SUMS, "square_sum", lambda x: plain.get(x.device.type, sum_squares)(x))
    monkeypatch.setattr(torch.optim, "AdamW", partial(_adamw, torch.optim.AdamW))
    fused = torch.backends.cuda.flash_sdp_enabled()
    torch.backends.cuda.enable_flash_sdp(False)
    yield
    torch.backends.cuda.enable_flash_sdp(fused)


def _adamw(kind, *args, fused=None, **options):
    return kind(*args, **options, foreach=True)
