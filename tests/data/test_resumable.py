"""A loader that goes on in the middle of an epoch gives the batches that an uninterrupted one gives."""

import pytest
import torch
from support.callbacks import Net, SaveAt, trainer
from support.data import byte_tokenizer

from wanda_lightning import TextDataModule
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


class Reading(Net):
    """Records the batches of each step."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def _loss(self, batch):
        self.seen.append(batch["input_ids"].tolist())
        return self(batch["input_ids"].float()).sum()


@pytest.mark.parametrize("limit", [1.0, 0.5, pytest.param(2, marks=pytest.mark.nightly)])
def test_a_run_that_is_resumed_at_any_step_reads_the_batches_of_an_uninterrupted_one(tmp_path, limit):
    def fit(*callbacks, **options):
        module, data = Reading(), TextDataModule(byte_tokenizer(), seqlen=32, num_samples=16, limit=1)
        lengths = {"max_epochs": 2, "limit_train_batches": limit, "limit_val_batches": 0}
        trainer(*callbacks, **lengths).fit(module, data, **options)
        return module.seen

    whole = fit(SaveAt(tmp_path, 1, 2, 3))
    for step in (1, 2, 3):
        assert fit(ckpt_path=tmp_path / f"{step}.ckpt") == whole[step:]
