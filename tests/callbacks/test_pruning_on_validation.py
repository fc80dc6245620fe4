"""Calibration on Lightning's own validation loop, against `prune` on the same batches."""

import copy

import lightning as L
import pytest
import torch
from support.callbacks import Net, loader, same, share_of_zeros, trainer
from support.zoo import ZOO
from torch import nn
from torch.utils.data import DataLoader

from wanda_lightning import PruningCallback, WandaPrune, prune


class Counting(Net):
    """Counts the batches that go through."""

    def __init__(self):
        super().__init__()
        self.passes = 0

    def forward(self, x):
        self.passes += 1
        return super().forward(x)


def on_validation(**options):
    return WandaPrune(calibrate_on="validation", **options)


def by_hand(module, count, sparsity=0.5):
    expected = Net()
    expected.load_state_dict(module.state_dict())
    prune(expected, list(loader(count)), sparsity, sequential="none", progress=False)
    return expected


@pytest.mark.parametrize("method", ["wanda", "fast"])
def test_validate_measures_the_dense_model_then_prunes_by_what_it_saw(method):
    module, callback = Counting(), PruningCallback(0.5, method=method, calibrate_on="validation")
    (dense,) = trainer().validate(Net(), loader(), verbose=False)
    expected = by_hand(module, 12)
    (measured,) = trainer(callback).validate(module, loader(), verbose=False)
    assert measured == dense
    assert module.passes == 3
    assert same(module, expected)
    assert callback.report.layers[0].tokens == 12
    (measured,) = trainer(callback).validate(module, loader(), verbose=False)
    assert measured == trainer().validate(expected, loader(), verbose=False)[0]
    assert same(module, expected)


class Branches(L.LightningModule):
    """Two layers read one tensor, which is changed between them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 6), nn.Linear(8, 6)

    def forward(self, x):
        x = x + 0
        s = self.a(x)
        return s + self.b(x.relu_())

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self(batch).square().mean())


def test_an_input_that_is_changed_in_place_is_another_input():
    """In inference mode, tensors have no version that would show it."""
    module, batches = Branches(), DataLoader(torch.randn(12, 8) - torch.linspace(-2, 2, 8), batch_size=4)
    expected = Branches()
    prune(expected, list(batches), 0.5, sequential="none", progress=False)
    trainer(on_validation()).validate(module, batches, verbose=False)
    assert same(module, expected)


def test_only_whole_batches_of_num_samples_count():
    module, callback = Net(), on_validation(num_samples=5)
    expected = by_hand(module, 8)
    trainer(callback).validate(module, loader(), verbose=False)
    assert same(module, expected)


def test_fit_prunes_at_the_end_of_the_validation_loop_that_follows():
    module, callback = Counting(), on_validation(at_step=2)
    sparsity = []

    class Watch(L.Callback):
        def on_validation_end(self, trainer, pl_module):
            sparsity.append(share_of_zeros(pl_module)["layers.0.weight"])

        def on_train_batch_end(self, *_):
            sparsity.append(share_of_zeros(module)["layers.0.weight"])

    trainer(callback, Watch(), max_epochs=2, num_sanity_val_steps=2).fit(module, loader(), loader())
    assert sparsity == [0, 0, 0, 0, 0.5, 0.5, 0.5, 0.5, 0.5]  # sanity check; three steps and validation, twice
    assert module.passes == 2 + 2 * (3 + 3)


def test_a_fit_that_ends_before_the_validation_loop_warns():
    with pytest.warns(UserWarning, match="no validation loop ended after pruning was due"):
        trainer(on_validation(at_step=3), max_epochs=1, check_val_every_n_epoch=2).fit(Net(), loader(), loader())


class OfZoo(L.LightningModule):
    """A model of the zoo, on its own batches."""

    def __init__(self, name):
        super().__init__()
        self.pruning_target = ZOO[name].build().train()

    def validation_step(self, batch, batch_idx):
        self.pruning_target(batch[0])

    def training_step(self, batch, batch_idx):
        return self.pruning_target(batch[0]).square().sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-4)


class CopyBefore(L.Callback):
    """The weights before the validation loop runs."""

    def on_validation_start(self, trainer, pl_module):
        with torch.inference_mode(False):
            self.copy = copy.deepcopy(pl_module.pruning_target)


@pytest.mark.parametrize(("name", "loop"), [("convnext_conv_mlp", "validate"), ("resnet18", "fit")])
def test_convolutions_are_read_although_lightning_is_in_inference_mode(name, loop):
    module, batches, before = OfZoo(name), ZOO[name].batches(), CopyBefore()
    run = trainer(before, on_validation(), max_epochs=1, num_sanity_val_steps=0)
    data = DataLoader(batches, batch_size=None)
    getattr(run, loop)(module, *[data] * (2 if loop == "fit" else 1))
    prune(before.copy, batches, sequential="none", keep_batch_norm=True, progress=False)
    assert same(module.pruning_target, before.copy)
    assert any(layer.ndim == 4 and (layer == 0).any() for layer in module.parameters())
    assert not any(parameter.is_inference() for parameter in module.parameters())
