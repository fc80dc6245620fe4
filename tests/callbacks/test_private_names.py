"""Private names of Lightning and torch that the callbacks rely on, since neither has a public way."""

import inspect

import lightning as L
import pytest
from lightning.pytorch.callbacks import (
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import nn
from torch.utils.data import DataLoader


@pytest.mark.parametrize(
    ("owner", "name", "purpose"),
    [
        (WeightAveraging(), "_average_model", "zero the pruned weights of an average"),
        (StochasticWeightAveraging(0.1), "_average_model", "zero the pruned weights of an average"),
        (L.LightningModule(), "_compiler_ctx", "refuse to distill a compiled module"),
        (nn.Module(), "_compiled_call_impl", "refuse to distill a compiled network"),
        (
            ModelCheckpoint(),
            "_last_global_step_saved",
            "write `last` beside a model that is not best",
        ),
        (
            ModelCheckpoint(),
            "_save_topk_checkpoint",
            "write `last` beside a model that is not best",
        ),
        (DataLoader([0]), "_iterator", "give a copied loader workers of its own"),
    ],
)
def test_a_private_name_still_exists(owner, name, purpose):
    kind = type(owner).__name__
    assert hasattr(owner, name), (
        f"{kind} has no {name} any more, which callbacks need to {purpose}."
    )


def test_a_checkpoint_is_saved_with_the_trainer_first():
    parameters = [*inspect.signature(ModelCheckpoint._save_topk_checkpoint).parameters]
    assert parameters[:2] == ["self", "trainer"], (
        "BestAfterPruning overrides ModelCheckpoint._save_topk_checkpoint, whose arguments have changed."
    )
