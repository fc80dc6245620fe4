"""What the callbacks read from a Trainer."""

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import FSDPStrategy, SingleDeviceStrategy
from support.callbacks import (
    Net,
    all_at,
    loader,
    share_of_zeros,
    trainer,
)

from wanda_lightning import (
    KeepZeros,
    WandaPrune,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # they would only slow down these tests
    pytest.mark.filterwarnings("ignore:.*but have no `val_dataloader`"),  # some tests only train
]


@pytest.mark.parametrize("callback", [WandaPrune, KeepZeros])
def test_strategies_that_cannot_be_pruned_are_refused_by_name(callback):
    class Elsewhere(SingleDeviceStrategy):
        """Stands for one that spreads the model in a way of its own."""

    spread = trainer(strategy=Elsewhere("cpu"))
    callback().setup(spread, Net(), "fit")
    spread.strategy.__class__ = FSDPStrategy  # which itself wants a GPU
    with pytest.raises(MisconfigurationException, match=r"FSDPStrategy spreads .* use strategy='ddp'"):
        callback().setup(spread, Net(), "fit")


def test_layers_are_named_as_in_the_pruning_target():
    class Wrapper(Net):
        @property
        def pruning_target(self):
            return self.layers

    module, callback = Wrapper(), WandaPrune(num_samples=12, skip=["2"])
    trainer(callback, max_epochs=1).fit(module, loader())
    assert [layer.name for layer in callback.report.layers] == ["0", "4"]
    assert share_of_zeros(module) == {**all_at(0.5), "layers.2.weight": 0.0}
