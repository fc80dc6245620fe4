"""What a pruning callback refuses or warns of before training starts."""

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_utilities.core import rank_zero
from support.callbacks import (
    Manual,
    Net,
    SaveAt,
    Steps,
    TwoOptimizers,
    all_at,
    fit_module,
    loader,
    same,
    share_of_zeros,
    trainer,
    wanda,
)
from support.refusals import refuses

from wanda_lightning import (
    BestAfterPruning,
    CubicSchedule,
    DistillFromDense,
    KeepZeros,
    LinearSchedule,
    OneShot,
    PruningCallback,
    SavePretrained,
    WandaPrune,
)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"at_step": -1}, "at_step must be a whole number of at least 0, but it is -1"),
        (
            {"at_step": 3, "schedule": OneShot(3)},
            r"exclude each other, but at_step=3 and schedule=OneShot\(step=3\)",
        ),
        ({"num_samples": 0}, "num_samples must be a whole number of at least 1, but it is 0"),
        (
            {"method": "best"},
            r"WandaPrune prunes by Wanda, but another method was chosen\. Use PruningCallback\.$",
        ),
        (
            {"calibrate_on": "test"},
            "calibrate_on must be one of calibration, validation, but it is 'test'",
        ),
        (
            {"pattern": "2:4", "schedule": CubicSchedule(0, 4, every=2)},
            r"one stage for NM\(n=2, m=4\).*Cubic",
        ),
    ],
)
def test_options_that_contradict_each_other_are_refused_at_once(options, message):
    with refuses(message):
        WandaPrune(**options)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dataloader": []}, "dataloader has other batches"),
        ({"sequential": "block"}, "sequential='block' runs pruned layers"),
        ({"allocation": "fisher"}, "allocation='fisher' needs backward passes"),
        ({"recovery": "reconstruct"}, "recovery='reconstruct' trains on the batches"),
    ],
)
def test_what_a_validation_loop_cannot_give_is_refused_at_once(options, reason):
    dense = "only collects statistics of the dense model while Lightning validates it"
    with refuses(f"{dense}, but {reason}"):
        WandaPrune(calibrate_on="validation", **options)


@pytest.mark.parametrize(
    ("make", "when", "options", "end"),
    [
        (Net, {"at_step": 1000}, {"max_steps": 10}, 10),
        # Two steps an epoch, of four batches and of two.
        (Net, {"at_step": 5}, {"max_epochs": 2, "accumulate_grad_batches": 4}, 4),
        (Net, {"at_step": 5}, {"max_epochs": 2, "max_steps": 4}, 4),
        (Net, {"schedule": Steps((1, 0.5), (20, 1.0))}, {"max_epochs": 2}, 12),
        (Manual, {"at_step": 9}, {"max_steps": 8}, 8),
    ],
)
def test_a_stage_after_the_end_of_training_is_refused_at_the_start(make, when, options, end):
    module = make()
    run = trainer(WandaPrune(num_samples=24, **when), **options)
    with pytest.raises(
        MisconfigurationException, match=rf"and training ends at {end}\. Prune earlier"
    ):
        run.fit(module, loader(24))
    assert same(module, Net())
    assert run.global_step == 0


@pytest.mark.parametrize(
    ("make", "at_step", "options"),
    [
        (Net, 4, {"max_epochs": 2, "accumulate_grad_batches": 3}),
        (TwoOptimizers, 12, {"max_epochs": 1}),  # twelve steps an epoch of six batches
    ],
)
def test_a_stage_at_the_end_of_training_prunes(make, at_step, options):
    module = make()
    fit_module(module, WandaPrune(num_samples=24, at_step=at_step), count=24, **options)
    assert share_of_zeros(module) == all_at(0.5)


class OnlySteps(L.LightningModule):
    """A module that must not begin to train."""

    def __init__(self):
        super().__init__()
        self.layers = Net().layers

    def training_step(self, batch, batch_idx):
        raise AssertionError

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters())


def with_forward(forward, name="forward"):
    return type("WithForward", (OnlySteps,), {name: forward})


Forward = with_forward(lambda self, x: self.layers(x))


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (OnlySteps, {}, 'is missing the required "forward" function'),
        (Forward, {"dataloader": []}, "must hold at least one calibration batch"),
        (
            Forward,
            {"dataloader": iter(loader())},
            "must be read by 2 stages of .*, but it is a _SingleProcess",
        ),
        (Forward, {"calibrate_on": "validation"}, "this fit has none"),
        (
            Forward,
            {"skip": ["layers.9"]},
            "skip='layers.9' matches no matrix of the model; the nearest is 'layers",
        ),
        (
            with_forward(lambda self, x, scale: self.layers(x * scale)),
            {},
            "missing 1 required positional argument: .scale.",
        ),
        (
            with_forward(lambda self, x: self.layers(x).sum()),
            {"method": "best"},
            "a batch gave Tensor without logits or vectors that depend on the pruned layers",
        ),
        (
            with_forward(lambda self, batch: None, name="calibration_step"),
            {"recovery": "distill"},
            "needs outputs, or their logits",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:num_samples is 12, but dataloader has only 0")
def test_data_that_a_later_stage_cannot_use_is_refused_at_the_start(make, options, message):
    callback = PruningCallback(num_samples=12, schedule=LinearSchedule(0, 4, every=2), **options)
    with pytest.raises(
        (ValueError, TypeError, NotImplementedError, MisconfigurationException), match=message
    ):
        fit_module(make(), callback, max_steps=6)


@pytest.mark.parametrize(
    ("when", "monitor", "dry", "last"),
    [
        ({"at_step": 3}, "loss", False, 3),
        ({"schedule": CubicSchedule(0, 4, every=2)}, "loss", False, 4),
        ({}, "loss", False, None),
        ({"at_step": 3}, None, False, None),
        ({"at_step": 3}, "loss", True, None),
    ],
)
def test_a_best_checkpoint_from_before_pruning_is_warned_of(
    tmp_path, when, monitor, dry, last, recwarn
):
    options = {"max_epochs": 2, "enable_checkpointing": True, "fast_dev_run": dry}
    best = ModelCheckpoint(tmp_path, monitor=monitor)
    trainer(wanda(**when), best, **options).fit(Net(), loader(), loader())
    warned = [str(each.message) for each in recwarn if "ModelCheckpoint(" in str(each.message)]
    assert len(warned) == (last is not None)
    for text in warned:
        assert f"before step {last}" in text
        assert "BestAfterPruning(monitor='loss')" in text


def test_testing_a_checkpoint_from_before_pruning_is_warned_of(tmp_path):
    run = trainer(wanda(at_step=3), SaveAt(tmp_path, 2), max_steps=6)
    run.fit(Net(), loader())
    module = Net()
    with pytest.warns(
        UserWarning,
        match="is that of a pruned model without training after pruning.*ckpt_path='last'",
    ):
        run.test(module, loader(), ckpt_path=tmp_path / "2.ckpt")
    assert share_of_zeros(module) == all_at(0.5)


@pytest.mark.parametrize(
    "callback",
    [
        WandaPrune(0.5),
        KeepZeros(),
        DistillFromDense(),
        SavePretrained("out"),
        BestAfterPruning("loss"),
    ],
    ids=lambda callback: type(callback).__name__,
)
def test_a_trainer_of_the_other_package_is_refused_before_anything_runs(callback, monkeypatch):
    # The import sends the messages of lightning to the other logger.
    monkeypatch.setattr(rank_zero, "log", rank_zero.log)
    import pytorch_lightning as pl

    class Theirs(pl.LightningModule):
        def training_step(self):
            pass

        def configure_optimizers(self):
            pass

    run = pl.Trainer(callbacks=[callback], accelerator="cpu", logger=False, max_epochs=1)
    with refuses("Write `import lightning.pytorch as pl`"):
        run.fit(Theirs(), loader())
