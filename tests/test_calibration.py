"""Calibrating in real loops of Lightning: on what its own loader gives, and without a trace in it."""

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler
from zoo import ZOO

from wanda_lightning import WandaPrune

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
