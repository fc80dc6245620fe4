"""Calibrating in real loops of Lightning: on what its own loader gives, and without a trace in it."""

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from support.callbacks import Net, loader, same, share_of_zeros
from support.zoo import ZOO
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from wanda_lightning import LinearSchedule, WandaPrune, prune

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # they would only slow down these tests
    pytest.mark.filterwarnings("ignore:.*but have no `val_dataloader`"),  # these tests only train
]

SAMPLES = torch.randn(12, 32, generator=torch.Generator().manual_seed(0))


class Diary(L.LightningModule):
    """Notes the batches that it is calibrated and trained on."""

    def __init__(self):
        super().__init__()
        self.layers = ZOO["plain_mlp"].build().train()
        self.calibrated, self.trained = [], []

    def calibration_step(self, batch):
        self.calibrated.append(batch)
        return self.layers(batch)

    def training_step(self, batch, batch_idx):
        self.trained.append(batch)
        return F.mse_loss(self.layers(batch), torch.zeros(len(batch), 16))

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def trainer(*callbacks, **kwargs):
    quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    return L.Trainer(accelerator="cpu", callbacks=list(callbacks), **quiet, **kwargs)


def fit(loader, *callbacks, epochs=1):
    module = Diary()
    trainer(*callbacks, max_epochs=epochs).fit(module, loader)
    return module


def assert_same(batches, expected):
    assert len(batches) == len(expected)
    assert all(map(torch.equal, batches, expected))


class Batched(Dataset):
    """Its items are batches."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return SAMPLES[4 * index : 4 * index + 4]


class BatchedStream(IterableDataset):
    def __iter__(self):
        return iter(SAMPLES.split(4))


@pytest.mark.parametrize("dataset", [Batched, BatchedStream])
def test_a_loader_of_batches_made_before(dataset):
    module = fit(DataLoader(dataset(), batch_size=None), WandaPrune(num_samples=10))
    assert_same(module.calibrated, [*SAMPLES[:8].split(4), SAMPLES[8:10]])
    assert_same(module.trained, SAMPLES.split(4))


class Turning(Sampler):
    """Begins one place further each time that it is read."""

    def __init__(self):
        self.epoch = 0

    def __len__(self):
        return len(SAMPLES)

    def __iter__(self):
        self.epoch += 1
        return iter([(self.epoch + i) % len(SAMPLES) for i in range(len(SAMPLES))])


class TurningBatches(Turning):
    """Batches of 3, 4 and 5."""

    def __len__(self):
        return 3

    def __iter__(self):
        order = list(super().__iter__())
        return iter([order[:3], order[3:7], order[7:]])


@pytest.mark.parametrize(
    ("option", "sampler", "sizes"), [("batch_sampler", TurningBatches, (3, 4, 5)), ("sampler", Turning, (4, 4, 4))]
)
def test_a_sampler_is_honoured_and_left_as_it_was(option, sampler, sizes):
    def loader():
        return DataLoader(SAMPLES, **{option: sampler()}, **({"batch_size": 4} if option == "sampler" else {}))

    dense, pruned = loader(), loader()
    without = fit(dense, epochs=2)
    module = fit(pruned, WandaPrune(num_samples=12), epochs=2)
    first, second = (SAMPLES.roll(-epoch, 0).split(sizes) for epoch in (1, 2))
    assert_same(module.trained, [*first, *second])
    # Lightning may have begun its own reading, or not.
    assert_same(module.calibrated, first if torch.equal(module.calibrated[0], first[0]) else second)
    assert_same(without.trained, module.trained)
    assert getattr(pruned, option).epoch == getattr(dense, option).epoch


class TrainsOnSetup(Diary):
    """Its train loader is there only after `setup("fit")`."""

    def setup(self, stage):
        if stage == "fit":
            self.samples = SAMPLES

    def train_dataloader(self):
        return DataLoader(self.samples, 4)


def test_a_train_loader_that_is_there_only_in_fit():
    module, before = TrainsOnSetup(), TrainsOnSetup().state_dict()
    with pytest.raises(
        MisconfigurationException, match=r"TrainsOnSetup\.train_dataloader\(\).* a dataloader="
    ) as caught:
        trainer(WandaPrune(num_samples=12)).validate(module, DataLoader(SAMPLES, 4))
    assert isinstance(caught.value.__cause__, AttributeError)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    trainer(WandaPrune(num_samples=12, dataloader=DataLoader(SAMPLES, 4))).validate(module, DataLoader(SAMPLES, 4))
    assert_same(module.calibrated, SAMPLES.split(4))


# ---- on the validation loop as it runs


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
    with pytest.raises(ValueError, match="sequential='none' and no dataloader, but sequential='block'"):
        WandaPrune(calibrate_on="validation")
    with pytest.raises(ValueError, match="'calibration' or 'validation', but 'test'"):
        WandaPrune(calibrate_on="test")
    with pytest.raises(MisconfigurationException, match="this fit has none"):
        trainer(on_validation(), max_epochs=1).fit(Net(), loader())
    with pytest.warns(UserWarning, match="no validation loop ended after it was due"):
        trainer(on_validation(at_step=3), max_epochs=1, check_val_every_n_epoch=2).fit(Net(), loader(), loader())
