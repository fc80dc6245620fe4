"""The callbacks named after their methods."""

import pytest

from wanda_lightning import (
    NM,
    PruningCallback,
    Wanda,
    WandaPrune,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # they would only slow down these tests
    pytest.mark.filterwarnings("ignore:.*but have no `val_dataloader`"),  # some tests only train
]


def test_names_and_objects_mean_the_same():
    assert PruningCallback(0.5, "wanda", "2:4").config == PruningCallback(0.5, Wanda(), NM(2, 4)).config
    assert WandaPrune(0.75, "1:4").config == PruningCallback(0.75, "wanda", NM(1, 4)).config
