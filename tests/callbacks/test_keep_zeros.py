"""KeepZeros on models that were pruned before."""

import copy
from functools import partial

import pytest
import torch
from support.callbacks import (
    ADAMW,
    SGD,
    Lion,
    Net,
    all_at,
    hooks_of,
    loader,
    same,
    share_of_zeros,
    to_quarters,
    trainer,
    zeros,
)
from support.held_zeros import AVERAGING, OPTIMIZERS, PRECISIONS, AveragesHoldZeros, LooksAtZeros, Witness, precision_of
from torch import nn

from wanda_lightning import (
    KeepZeros,
    WandaPrune,
    prune,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # they would only slow down these tests
    pytest.mark.filterwarnings("ignore:.*but have no `val_dataloader`"),  # some tests only train
]


class TestKeepZeros:
    @pytest.mark.parametrize("optimizer", [SGD, ADAMW], ids=["momentum", "adamw"])
    def test_keeps_the_zeros_of_a_pruned_model(self, optimizer):
        module = Net(optimizer)
        prune(module, criterion="magnitude", pattern="2:4", skip=["layers.2"], progress=False)
        pruned, before = zeros(module), copy.deepcopy(module)
        trainer(KeepZeros(), max_epochs=2).fit(module, loader())
        assert all(torch.equal(where, pruned[name]) for name, where in zeros(module).items())
        assert share_of_zeros(module) == {**all_at(0.5), "layers.2.weight": 0.0}
        assert not any(map(torch.equal, module.parameters(), before.parameters()))
        assert hooks_of(module, module.used_optimizer) == []

    def test_warns_on_a_dense_model(self):
        module, alone = Net(), Net()
        with pytest.warns(UserWarning, match="KeepZeros found no zeros in any prunable layer"):
            trainer(KeepZeros(), max_epochs=1).fit(module, loader())
        trainer(max_epochs=1).fit(alone, loader())
        assert same(module, alone)

    def test_layers_that_start_at_zero_train(self):
        module = Net()
        prune(module, criterion="magnitude", skip=["layers.4"], progress=False)
        nn.init.zeros_(module.layers[4].weight)
        trainer(KeepZeros(), max_epochs=2).fit(module, loader())
        shares = share_of_zeros(module)
        assert shares.pop("layers.4.weight") < 0.25  # dead units have no gradient
        assert set(shares.values()) == {0.5}

    def test_zeros_read_again_at_each_fit(self):
        module, callback = Net(), KeepZeros()
        prune(module, criterion="magnitude", sparsity=0.25, progress=False)
        trainer(callback, max_steps=1).fit(module, loader())
        prune(module, criterion="magnitude", sparsity=0.75, progress=False)
        trainer(callback, max_steps=1).fit(module, loader())
        assert share_of_zeros(module) == all_at(0.75)


@pytest.mark.parametrize("optimizer", ["momentum", "adamw_foreach", "lion", "noisy"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_keep_zeros_alone_on_a_model_pruned_elsewhere(optimizer, precision):
    module = LooksAtZeros(OPTIMIZERS[optimizer])
    for name in ("layers.0", "layers.4"):  # any zeros, at random
        with torch.no_grad():
            weight = module.get_parameter(f"{name}.weight")
            weight.mul_(torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.3)
    options = {"max_steps": 20, "gradient_clip_val": 0.5, **precision_of(precision)}
    trainer(Witness(), KeepZeros(), **options).fit(module, loader(24))
    assert share_of_zeros(module)["layers.2.weight"] == 0
    assert all(0.6 < share_of_zeros(module)[f"{name}.weight"] < 0.8 for name in ("layers.0", "layers.4"))
    assert all(share > 0.5 for share in module.trained().values())


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("kind", AVERAGING)
def test_averages_of_a_model_pruned_elsewhere(kind, order):
    module, averaging = LooksAtZeros(), AVERAGING[kind]()
    prune(module, criterion="magnitude", progress=False)
    last = AveragesHoldZeros(averaging)
    trainer(*[KeepZeros(), averaging][::order], last, max_epochs=4).fit(module, loader())
    assert all(torch.equal(where, module.pruned[name]) for name, where in zeros(module).items())


def test_keep_zeros_on_a_dense_model_warns():
    module = Net(ADAMW)
    with pytest.warns(UserWarning, match="KeepZeros found no zeros in any prunable layer. Load pruned weights, or"):
        trainer(KeepZeros(), max_steps=2).fit(module, loader())
    assert share_of_zeros(module) == all_at(0.0)


@pytest.mark.parametrize("callback", ["prune", "keep"])
def test_a_layer_of_all_zeros_trains(callback):
    module = Net(ADAMW)
    nn.init.zeros_(module.layers[4].weight)
    if callback == "keep":
        prune(module, criterion="magnitude", skip=["layers.4"], progress=False)
    callbacks = {"prune": WandaPrune(num_samples=12), "keep": KeepZeros()}
    trainer(callbacks[callback], max_steps=6).fit(module, loader())
    shares = share_of_zeros(module)
    assert shares.pop("layers.4.weight") < 0.25  # dead units have no gradient
    assert set(shares.values()) == {0.5}


def test_keep_zeros_reads_its_layers_anew_at_each_fit():
    callback, first, second = KeepZeros(), LooksAtZeros(ADAMW), LooksAtZeros(ADAMW)
    prune(first, criterion="magnitude", skip=["layers.2", "layers.4"], progress=False)
    prune(second, criterion="magnitude", skip=["layers.0"], progress=False)
    for module in (first, second):
        trainer(callback, max_steps=4).fit(module, loader())
    prune(first, criterion="magnitude", progress=False)  # more of the same model
    first.pruned = None
    trainer(callback, max_steps=4).fit(first, loader())
    assert share_of_zeros(first) == all_at(0.5)


def test_keep_zeros_works_with_another_kind_of_model():
    class Other(Net):
        def __init__(self):
            super().__init__(ADAMW)
            self.body, self.layers = nn.Linear(32, 16), None

        def forward(self, x):
            return self.body(x)

    callback = KeepZeros()
    for module in (Net(ADAMW), Other()):
        prune(module, criterion="magnitude", progress=False)
        trainer(callback, max_steps=2).fit(module, loader())
        assert set(share_of_zeros(module).values()) == {0.5}


def test_zeros_by_chance_of_one_model_do_not_affect_another():
    optimizer = partial(Lion, lr=0.25, betas=(0.0, 0.0))
    callback, first, second = KeepZeros(), Net(optimizer), LooksAtZeros(ADAMW)
    to_quarters(first)
    prune(first, criterion="magnitude", progress=False)
    trainer(callback, max_steps=1).fit(first, loader())
    assert all(share > 0.5 for share in share_of_zeros(first).values())
    prune(second, criterion="magnitude", progress=False)
    trainer(callback, max_steps=4).fit(second, loader())
    assert share_of_zeros(second) == all_at(0.5)
