"""A loader that goes on in the middle of an epoch gives the batches that an uninterrupted one gives."""

import pytest
import torch

from wanda_lightning.data.resumable import ResumableLoader


def shuffled():
    return ResumableLoader(range(10), 3, shuffle=True, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("read", [0, 1, 3, 4, 5, 7, 8])
def test_the_rest_of_an_epoch(read):
    whole, stopped, resumed = shuffled(), shuffled(), shuffled()
    expected = [batch.tolist() for _ in range(3) for batch in whole]
    batches = (batch for _ in range(3) for batch in stopped)
    assert [next(batches).tolist() for _ in range(read)] == expected[:read]
    resumed.load_state_dict(stopped.state_dict())
    assert [batch.tolist() for _ in range(3) for batch in resumed][: 12 - read] == expected[read:]
