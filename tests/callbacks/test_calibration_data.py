"""Calibration batches: which loader, which samples, and how they run through the module."""

from contextlib import nullcontext
from copy import deepcopy
from functools import partial

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from support.callbacks import (
    Net,
    OfZoo,
    Recorder,
    Resumable,
    all_at,
    fit_module,
    loader,
    pruned_by_hand,
    run_loop,
    same,
    samples,
    share_of_zeros,
    tagged,
    trainer,
    validate_module,
    wanda,
)
from support.layers import assert_same, rng
from support.quiet import prune
from support.zoo import batches_of, model_of
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, Sampler

from wanda_lightning import PruningCallback, WandaPrune
from wanda_lightning.calibration.batches import batch_size


class Data(L.LightningDataModule):
    def __init__(self, **loaders):
        super().__init__()
        self.stages = []
        for name, tag in loaders.items():
            setattr(self, name, partial(tagged, tag))

    def setup(self, stage):
        self.stages.append(stage)

    def val_dataloader(self):
        return tagged(9)


class TrainData(Data):
    def train_dataloader(self):
        assert "fit" in self.stages
        return tagged(5)


class Calibrating(Recorder):
    def calibration_dataloader(self):
        return tagged(3)


class Training(Recorder):
    def train_dataloader(self):
        return tagged(6)


def both():
    return TrainData(calibration_dataloader=2)


def tags_of(batches):
    return [batch[0].unique().item() for batch in batches]


class TestCalibrationSource:
    @pytest.mark.parametrize(
        ("tag", "make", "loop", "data", "given"),
        [
            (1, Calibrating, "validate", both, tagged(1)),
            (2, Calibrating, "validate", both, None),
            (3, Calibrating, "validate", TrainData, None),
            (5, Training, "validate", TrainData, None),
            (6, Training, "validate", Data, None),
            (9, Recorder, "validate", Data, None),
            (3, Calibrating, "fit", lambda: tagged(7), None),
            (7, Training, "fit", lambda: tagged(7), None),
            (8, Recorder, "test", lambda: [tagged(8)], None),
            (8, Recorder, "predict", lambda: tagged(8), None),
        ],
    )
    def test_order(self, tag, make, loop, data, given):
        module = make()
        getattr(
            trainer(WandaPrune(num_samples=4, dataloader=given, sequential="none"), max_steps=1),
            loop,
        )(module, data())
        assert tags_of(module.seen) == [tag]

    def test_several_loaders_are_refused(self):
        module = Net()
        several = [tagged(1), tagged(2)]
        with pytest.raises(MisconfigurationException, match="since there are 2 val dataloaders"):
            validate_module(module, WandaPrune(num_samples=4), data=several)
        assert same(module, Net())
        validate_module(module, WandaPrune(num_samples=4, dataloader=tagged(1)), data=several)
        assert share_of_zeros(module) == all_at(0.5)

    @pytest.mark.parametrize("sequential", ["layer", "none"])
    def test_samples_are_counted_and_the_last_batch_is_cut(self, sequential):
        module = Recorder()
        batches = list(loader(12))
        callback = WandaPrune(num_samples=6, sequential=sequential, dataloader=batches)
        validate_module(module, callback)
        # Single samples may have run before, for comparison.
        assert_same(module.seen[-2:], [batches[0], [x[:2] for x in batches[1]]])
        assert {layer.tokens for layer in callback.report.layers} == {6}
        assert callback.report.config["calibration_batches"] == 2

    def test_a_batch_of_time_steps_is_not_cut(self):
        module = Recorder()
        module.forward = lambda x: module.layers(x.cumsum(0))
        validate_module(
            module, WandaPrune(num_samples=6, dataloader=list(loader(12)), sequential="none")
        )
        assert [len(x) for x, _ in module.seen] == [4, 4]

    def test_fewer_samples_than_asked(self):
        module = Net()
        callback = WandaPrune(num_samples=100)
        with pytest.warns(UserWarning, match=r"num_samples is 100, but .* has only 12\."):
            validate_module(module, callback)
        assert {layer.tokens for layer in callback.report.layers} == {12}


class Shifted:
    """Transfer hooks, as a module or a data module has them."""

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return batch[0] + 1, batch[1]

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch[0] * 10, batch[1]


class ShiftedModule(Shifted, Recorder):
    pass


class ShiftedData(Shifted, Data):
    pass


@pytest.mark.parametrize(
    ("make", "data"),
    [(ShiftedModule, tagged(2)), (Recorder, ShiftedData(calibration_dataloader=2))],
)
def test_transfer_hooks_are_applied(make, data):
    module = make()
    validate_module(module, WandaPrune(num_samples=4, sequential="none"), data=data)
    assert tags_of(module.seen) == [30]


@pytest.mark.parametrize(
    ("precision", "dtype", "autocast"),
    [
        ("bf16-true", torch.bfloat16, nullcontext()),
        pytest.param("16-true", torch.float16, nullcontext(), marks=pytest.mark.nightly),
        ("bf16-mixed", torch.float32, torch.autocast("cpu", torch.bfloat16)),
    ],
)
def test_any_precision_prunes_like_prune(precision, dtype, autocast):
    batches = [{"input_ids": torch.randint(128, (2, 16))} for _ in range(4)]
    module = OfZoo("llama")
    model = model_of("llama").to(dtype)
    callback = PruningCallback(0.5, method="thorough", dataloader=batches, num_samples=8)
    run_loop("test", module, callback, precision=precision)
    with autocast:
        report = prune(model, batches, 0.5, method="thorough")
    assert callback.report.training == report.training
    assert_same(module.pruning_target, model)


SAMPLES = samples()


class Turning(Sampler):
    """Batches of 3, 4 and 5, from one place later in each epoch."""

    epoch = 0

    def __len__(self):
        return 3

    def __iter__(self):
        self.epoch += 1
        order = [(self.epoch + i) % len(SAMPLES) for i in range(len(SAMPLES))]
        return iter([order[:3], order[3:7], order[7:]])


class Listed(DataLoader):
    """A subclass with another constructor and a random state."""

    def __init__(self, dataset, seed):
        generator = rng(seed)
        self.jitter = rng(seed)
        super().__init__(dataset, batch_size=4, shuffle=True, generator=generator)

    def __iter__(self):
        for x, y in super().__iter__():
            yield [x + torch.rand(x.shape, generator=self.jitter), y]


def shuffled():
    return DataLoader(samples(), batch_size=4, shuffle=True, generator=rng(3))


def with_a_worker():
    return DataLoader(samples(), batch_size=4, num_workers=1, persistent_workers=True)


OTHERS = [
    lambda: Listed(samples(), 3),
    lambda: DataLoader(SAMPLES, batch_sampler=Turning()),
    lambda: Resumable(12),
]
SHUFFLED = "ignore:Your `val_dataloader`'s sampler has shuffling enabled"


@pytest.mark.filterwarnings(SHUFFLED)
@pytest.mark.parametrize("make", [shuffled, with_a_worker, *OTHERS])
@pytest.mark.parametrize(
    ("loop", "at_step", "batches"),
    [("fit", 2, 6), ("validate", 0, 3)],  # step 2 is in the middle of an epoch
)
def test_calibration_changes_no_batch_of_the_loop(make, loop, at_step, batches):
    alone = Recorder()
    run_loop(loop, alone, data=make(), max_epochs=2)
    calibrating = Recorder()
    run_loop(
        loop, calibrating, WandaPrune(num_samples=4, at_step=at_step), data=make(), max_epochs=2
    )
    assert len(alone.trained) == batches
    assert_same(calibrating.trained, alone.trained)


@pytest.mark.parametrize(
    "lengths",
    [
        {"pixel_values": 104, "image_grid_thw": 5, "input_ids": 4, "attention_mask": 4},
        {"pixel_values": 96, "input_ids": 4, "grid": 6},  # a tie
    ],
)
def test_the_size_of_a_batch(lengths):
    assert batch_size({name: torch.zeros(length, 3) for name, length in lengths.items()}) == 4


class BatchedStream(IterableDataset):
    def __iter__(self):
        return iter(loader())


def test_a_loader_of_precomputed_batches():
    module = Recorder()
    fit_module(
        module,
        WandaPrune(num_samples=10, sequential="none"),
        data=DataLoader(BatchedStream(), batch_size=None),
        max_epochs=1,
    )
    batches = [*loader()]
    assert_same(module.seen, [*batches[:2], [x[:2] for x in batches[2]]])
    assert_same(module.trained, batches)


@pytest.mark.parametrize(
    ("data", "tried", "batches"),
    [
        (shuffled(), 1, shuffled()),
        (iter(loader()), 0, loader()),
        (DataLoader(BatchedStream(), batch_size=None), 0, loader()),
    ],
)
def test_trying_out_a_batch_at_the_start_does_not_advance_the_loader(data, tried, batches):
    """Of a stream, none is tried out."""
    module = Recorder()
    fit_module(module, wanda(dataloader=data, at_step=2, sequential="none"), max_steps=3)
    assert_same(module.seen[tried:], [*batches])


@pytest.mark.filterwarnings("ignore:Your .* sampler has shuffling enabled")
@pytest.mark.parametrize("loop", ["fit", "validate"])
def test_a_batch_sampler_is_read_as_a_batch_size_is(loop):
    sampler = RandomSampler(SAMPLES)
    seen = []
    for data in (
        DataLoader(SAMPLES, 5, sampler=sampler, drop_last=True),
        DataLoader(SAMPLES, batch_sampler=BatchSampler(sampler, 5, drop_last=True)),
    ):
        L.seed_everything(3, verbose=False)
        module = Recorder()
        run_loop(loop, module, wanda(), data=data, max_epochs=1)
        seen.append(module.seen)
    assert_same(*seen)


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


@pytest.mark.parametrize(
    ("options", "count"),
    [({"method": "wanda"}, 12), ({"method": "fast"}, 12), ({"num_samples": 5}, 8)],
)
def test_validate_measures_the_dense_model_and_prunes_by_what_it_saw(options, count):
    """Of whole batches. The next one measures the pruned model."""
    module = Counting()
    callback = PruningCallback(0.5, calibrate_on="validation", **options)
    dense = validate_module(Net())
    expected = pruned_by_hand(module.state_dict(), 0.5, count, sequential="none")
    assert validate_module(module, callback) == dense
    assert module.passes == 3
    assert same(module, expected)
    assert callback.report.layers[0].tokens == count
    assert validate_module(module, callback) == validate_module(expected)
    assert same(module, expected)


def test_fit_prunes_at_the_end_of_the_validation_loop_that_follows():
    module = Counting()
    callback = on_validation(at_step=2)
    sparsity = []

    def watch(*_):
        sparsity.append(share_of_zeros(module)["layers.0.weight"])

    watching = L.pytorch.callbacks.LambdaCallback(on_validation_end=watch, on_train_batch_end=watch)
    options = {"max_epochs": 2, "num_sanity_val_steps": 2}
    trainer(callback, watching, **options).fit(module, loader(), loader())
    # The sanity check, then three steps and a validation loop, twice.
    assert sparsity == [0, 0, 0, 0, 0.5, 0.5, 0.5, 0.5, 0.5]
    assert module.passes == 2 + 2 * (3 + 3)


def test_a_fit_that_ends_before_the_validation_loop_warns():
    with pytest.warns(UserWarning, match="no validation loop ended after pruning was due"):
        trainer(on_validation(at_step=3), max_epochs=1, check_val_every_n_epoch=2).fit(
            Net(), loader(), loader()
        )


class CopyBefore(L.Callback):
    """The weights before the validation loop runs."""

    def on_validation_start(self, trainer, pl_module):
        with torch.inference_mode(False):
            self.copy = deepcopy(pl_module.pruning_target)


@pytest.mark.parametrize(
    ("name", "loop", "loaders"), [("convnext_conv_mlp", "validate", 1), ("resnet18", "fit", 2)]
)
def test_convolutions_are_read_although_lightning_is_in_inference_mode(name, loop, loaders):
    module = OfZoo(name)
    batches = batches_of(name)
    before = CopyBefore()
    run = trainer(before, on_validation(), max_epochs=1, num_sanity_val_steps=0)
    getattr(run, loop)(module, *[DataLoader(batches, batch_size=None)] * loaders)
    prune(before.copy, batches, sequential="none", keep_batch_norm=True)
    assert same(module.pruning_target, before.copy)
    assert any(layer.ndim == 4 and (layer == 0).any() for layer in module.parameters())
    assert not any(parameter.is_inference() for parameter in module.parameters())
