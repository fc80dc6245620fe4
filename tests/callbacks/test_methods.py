"""The callbacks named after their methods."""

import pytest
from support.callbacks import Net, loader, same, trainer

from wanda_lightning import (
    NM,
    MagnitudePrune,
    PruningCallback,
    SparseGPT,
    SparseGPTPrune,
    Wanda,
    WandaPrune,
    prune,
)

pytestmark = [pytest.mark.filterwarnings("ignore:.*does not have many workers")]


def test_names_and_objects_mean_the_same():
    assert PruningCallback(0.5, criterion="wanda", pattern="2:4").config == WandaPrune(0.5, pattern=NM(2, 4)).config
    assert WandaPrune(0.75, pattern="1:4").config == PruningCallback(0.75, criterion=Wanda(), pattern=NM(1, 4)).config


@pytest.mark.parametrize("allocation", ["owl", "fisher"])
@pytest.mark.parametrize("source", ["own", "the loop's"])
def test_magnitude_reads_data_for_its_allocation(allocation, source):
    module, by_hand = Net(), Net()
    own = loader() if source == "own" else None
    callback = MagnitudePrune(0.6, allocation=allocation, num_samples=12, dataloader=own)
    trainer(callback).validate(module, loader(16) if source == "own" else loader())
    prune(by_hand, list(loader()), 0.6, method="magnitude", allocation=allocation, progress=False)
    assert same(module, by_hand)
    assert len({layer.target for layer in callback.report.layers}) > 1


@pytest.mark.parametrize(
    ("callback", "method"), [(WandaPrune, "wanda"), (SparseGPTPrune, "sparsegpt"), (MagnitudePrune, "magnitude")]
)
@pytest.mark.parametrize("choices", [{}, {"pattern": "unstructured"}, {"pattern": "2:4", "skip": ["*.0"]}])
def test_each_is_the_method_of_its_name(callback, method, choices):
    assert callback(**choices).config == PruningCallback(method=method, **choices).config
    assert callback(0.25).config.sparsity == 0.25


def test_dampening_reaches_the_solver():
    assert SparseGPTPrune(dampening=0.5).config.solver == SparseGPT(dampening=0.5)


@pytest.mark.parametrize("callback", [WandaPrune, SparseGPTPrune, MagnitudePrune])
def test_a_callback_named_after_a_method_takes_no_other(callback):
    with pytest.raises(TypeError, match="method"):
        callback(0.5, method="ria")
