"""Calibration on Lightning's own validation loop, against `prune` on the same batches."""

import lightning as L
import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from support.callbacks import Net, loader, same, share_of_zeros, trainer

from wanda_lightning import LinearSchedule, WandaPrune, prune

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # they would only slow down these tests
    pytest.mark.filterwarnings("ignore:.*but have no `val_dataloader`"),  # some tests only train
]


class Counting(Net):
    """Counts the batches that go through."""

    def __init__(self):
        super().__init__()
        self.passes = 0

    def forward(self, x):
        self.passes += 1
        return super().forward(x)


def on_validation(**options):
    return WandaPrune(sequential="none", calibrate_on="validation", **options)


def by_hand(module, count, sparsity=0.5):
    expected = Net()
    expected.load_state_dict(module.state_dict())
    prune(expected, list(loader(count)), sparsity, sequential="none", progress=False)
    return expected


def test_validate_measures_the_dense_model_then_prunes_by_what_it_saw():
    module, callback = Counting(), on_validation()
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


def test_a_schedule_on_validation():
    module, callback = Net(), on_validation(sparsity=0.8, schedule=LinearSchedule(0, 6, every=3))
    trainer(callback, max_epochs=2, num_sanity_val_steps=0).fit(module, loader(), loader())
    assert [layer.sparsity for layer in callback.report.layers] == pytest.approx([0.8] * 3, abs=0.02)


def test_what_cannot_be_calibrated_on_validation():
    with pytest.raises(ValueError, match="sequential='none' and no dataloader, but sequential is 'block'"):
        WandaPrune(calibrate_on="validation")
    with pytest.raises(ValueError, match="calibrate_on must be one of calibration, validation, but it is 'test'"):
        WandaPrune(calibrate_on="test")
    with pytest.raises(MisconfigurationException, match="this fit has none"):
        trainer(on_validation(), max_epochs=1).fit(Net(), loader())
    with pytest.warns(UserWarning, match="no validation loop ended after pruning was due"):
        trainer(on_validation(at_step=3), max_epochs=1, check_val_every_n_epoch=2).fit(Net(), loader(), loader())
