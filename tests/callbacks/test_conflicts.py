"""What a pruning callback refuses or warns of before training starts."""

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from support.callbacks import Manual, Net, SaveAt, Steps, TwoOptimizers, all_at, loader, same, share_of_zeros, trainer
from support.zoo import ZOO

from wanda_lightning import CubicSchedule, LinearSchedule, PruningCallback, WandaPrune


@pytest.mark.parametrize(
    ("when", "options", "end"),
    [
        ({"at_step": 1000}, {"max_steps": 10}, 10),
        ({"at_step": 5}, {"max_epochs": 2, "accumulate_grad_batches": 4}, 4),  # two, of four batches and of two
        ({"at_step": 5}, {"max_epochs": 2, "limit_train_batches": 2}, 4),
        ({"at_step": 5}, {"max_epochs": 2, "max_steps": 4}, 4),
        ({"schedule": Steps((1, 0.5), (20, 1.0))}, {"max_epochs": 2}, 12),
    ],
)
def test_a_stage_after_the_end_of_training_is_refused_at_the_start(when, options, end):
    module = Net()
    steps = []
    module.register_forward_pre_hook(lambda *_: steps.append(1))
    with pytest.raises(MisconfigurationException, match=rf"and training ends at {end}\. Prune earlier"):
        trainer(WandaPrune(num_samples=24, **when), **options).fit(module, loader(24))
    assert same(module, Net())
    assert not steps


@pytest.mark.parametrize(
    ("make", "at_step", "options"),
    [
        (Net, 4, {"max_epochs": 2, "accumulate_grad_batches": 3}),
        (TwoOptimizers, 12, {"max_epochs": 1}),  # twelve steps an epoch of six batches
    ],
)
def test_a_stage_at_the_end_of_training_is_not_refused(make, at_step, options):
    module = make()
    trainer(WandaPrune(num_samples=24, at_step=at_step), **options).fit(module, loader(24))
    assert share_of_zeros(module) == all_at(0.5)


@pytest.mark.parametrize("make", [Manual, TwoOptimizers])
def test_manual_optimization_is_refused_by_max_steps(make):
    module = make()
    with pytest.raises(MisconfigurationException, match="ends at optimizer step 9 and training ends at 8"):
        trainer(WandaPrune(num_samples=24, at_step=9), max_steps=8).fit(module, loader(24))
    assert same(module, Net())


class OnlySteps(L.LightningModule):
    """A module that must not begin to train."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 16))

    def training_step(self, batch, batch_idx):
        raise AssertionError

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters())


class WithoutPredictions(OnlySteps):
    def calibration_step(self, batch):
        self.layers(batch[0])


class Forward(OnlySteps):
    def forward(self, x):
        return self.layers(x)


class TwoArguments(OnlySteps):
    def forward(self, x, scale):
        return self.layers(x * scale)


class Regression(OnlySteps):
    def forward(self, x):
        return self.layers(x)[:, :1]


class Detached(OnlySteps):
    def forward(self, x):
        return self.layers(x).detach()


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (OnlySteps, {}, r"OnlySteps must define forward\(\) or calibration_step"),
        (Forward, {"dataloader": []}, "must hold at least one calibration batch"),
        (Forward, {"dataloader": iter(loader())}, "must be read by 2 stages of .*, but it is a _SingleProcess"),
        (TwoArguments, {}, "TwoArguments.forward needs x, scale"),
        (Regression, {"method": "best"}, r"a batch gave Tensor of shape \(1, 1\) without logits of two or more"),
        (Detached, {"method": "best"}, r"a batch gave Tensor of shape \(1, 16\) without logits .* that depend"),
        (WithoutPredictions, {"recovery": "distil"}, "needs outputs, or their logits"),
    ],
)
@pytest.mark.filterwarnings("ignore:num_samples is 12, but dataloader has only 0")
def test_data_that_a_later_stage_cannot_use_is_refused_at_the_start(make, options, message):
    callback = PruningCallback(num_samples=12, schedule=LinearSchedule(0, 4, every=2), **options)
    with pytest.raises((ValueError, MisconfigurationException), match=message):
        trainer(callback, max_steps=6).fit(make(), loader())


def test_two_train_loaders_are_refused_at_the_start():
    with pytest.raises(MisconfigurationException, match="since there are 2 train dataloaders"):
        trainer(WandaPrune(at_step=2), max_steps=6).fit(Forward(), [loader(), loader()])


class TestBestFromBeforePruning:
    @pytest.mark.parametrize("when", [{"at_step": 3}, {"schedule": CubicSchedule(0, 4, every=2)}])
    def test_is_warned_of_when_training_starts(self, tmp_path, when):
        monitor = ModelCheckpoint(tmp_path, monitor="loss")
        run = trainer(WandaPrune(num_samples=12, **when), monitor, max_epochs=2, enable_checkpointing=True)
        last = when.get("at_step", 4)
        with pytest.warns(
            UserWarning, match=rf"monitor='loss'\) also .* before step {last}.*BestAfterPruning\(monitor='loss'\)"
        ):
            run.fit(Net(), loader(), loader())

    @pytest.mark.parametrize(("at_step", "monitor", "dry"), [(0, "loss", False), (3, None, False), (3, "loss", True)])
    def test_is_not_warned_of_where_it_cannot_be(self, tmp_path, at_step, monitor, dry, recwarn):
        options = {"max_epochs": 2, "enable_checkpointing": True, "fast_dev_run": dry}
        run = trainer(
            WandaPrune(num_samples=12, at_step=at_step), ModelCheckpoint(tmp_path, monitor=monitor), **options
        )
        run.fit(Net(), loader(), loader())
        assert "ModelCheckpoint" not in "".join(str(warning.message) for warning in recwarn)

    def test_is_warned_of_when_testing_prunes_it(self, tmp_path):
        callback = WandaPrune(num_samples=12, at_step=3)
        run = trainer(callback, SaveAt(tmp_path, 2), max_steps=6)
        run.fit(Net(), loader())
        module = Net()
        with pytest.warns(
            UserWarning, match="is that of a pruned model without training after pruning.*ckpt_path='last'"
        ):
            run.test(module, loader(), ckpt_path=tmp_path / "2.ckpt")
        assert share_of_zeros(module) == all_at(0.5)


class TestTwoCallbacks:
    @pytest.mark.parametrize(
        ("part", "loop"), [({}, "fit"), ({"skip": ["layers.0"]}, "validate"), ({"only": ["layers.0"]}, "fit")]
    )
    def test_that_prune_the_same_layers_are_refused(self, part, loop):
        first, second = WandaPrune(0.25, num_samples=4, **part), WandaPrune(0.5, num_samples=4, at_step=3, **part)
        module = Net()
        with pytest.raises(RuntimeError, match=r"more than one stateful callback of type `WandaPrune`.*documentation"):
            getattr(trainer(first, second, max_steps=1), loop)(module, loader())
        assert same(module, Net())


class TestExperts:
    """They leave the model, so its optimizer must not hold it yet."""

    class Routed(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = ZOO["mixtral"].build().train()

        def forward(self, ids):
            return self.net(ids).logits

        def step(self, batch):
            loss = self(batch[0]).square().mean()
            self.log("val_loss", loss)
            return loss

        def training_step(self, batch, index):
            return self.step(batch)

        def validation_step(self, batch, index):
            self.step(batch)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def data(self):
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randint(32, (24, 8))), batch_size=4)

    def test_are_not_dropped_when_training_starts(self):
        module = self.Routed()
        with pytest.raises(
            MisconfigurationException, match=r"pattern='experts' replaces parameters .* before training"
        ):
            trainer(WandaPrune(0.5, pattern="experts", num_samples=24), max_epochs=1).fit(module, self.data())
        assert same(module, self.Routed())

    def test_are_dropped_before_an_evaluation_and_then_the_rest_can_train(self):
        module, callback = self.Routed(), WandaPrune(0.5, pattern="experts", num_samples=24)
        trainer(callback).validate(module, self.data(), verbose=False)
        assert [len(layer.mlp.gate.weight) for layer in module.net.model.layers] == [2, 2]
        trainer(callback).validate(module, self.data(), verbose=False)  # not a second time
        assert [len(layer.mlp.gate.weight) for layer in module.net.model.layers] == [2, 2]
        before = module.net.model.layers[0].mlp.gate.weight.clone()
        trainer(callback, max_epochs=1).fit(module, self.data())
        assert not torch.equal(module.net.model.layers[0].mlp.gate.weight, before)
