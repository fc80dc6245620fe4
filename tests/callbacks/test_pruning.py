"""The callbacks in real loops of Lightning, against `prune` by hand and training loops written out."""

import copy
import gc
import json
import os
import pickle
import signal
import threading
from functools import partial
from typing import NamedTuple

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import FSDPStrategy, SingleDeviceStrategy
from support.callbacks import (  # noqa: F401
    ADAMW,
    LAYERS,
    SGD,
    Net,
    all_at,
    loader,
    one_thread,
    rows_of,
    same,
    samples,
    share_of_zeros,
    train_by_hand,
    trainer,
    zeros,
)
from support.zoo import ZOO
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from wanda_lightning import (
    NM,
    CausalLMModule,
    ImageClassifierModule,
    ImageDataModule,
    KeepZeros,
    MagnitudePrune,
    PruningCallback,
    TextDataModule,
    Wanda,
    WandaPrune,
    prune,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # they would only slow down these tests
    pytest.mark.filterwarnings("ignore:.*but have no `val_dataloader`"),  # some tests only train
]


def hooks_of(module, optimizer):
    on_weights = [name for name, weight in module.named_parameters() if weight._post_accumulate_grad_hooks]
    on_layers = [name for name, m in module.named_modules() if m._forward_hooks or m._forward_pre_hooks]
    replaced = [name for name, m in module.named_modules() if "forward" in vars(m)]
    on_steps = [*optimizer._optimizer_step_post_hooks, *_global_optimizer_post_hooks]
    return on_weights + on_layers + replaced + on_steps


class TestMeasuring:
    @pytest.mark.parametrize("sequential", ["block", "layer", "none"])
    @pytest.mark.parametrize("loop", ["validate", "test", "predict"])
    def test_the_pruned_model_is_measured(self, loop, sequential):
        by_hand, module, dense = Net(), Net(), Net()
        prune(by_hand, list(loader()), 0.5, sequential=sequential, progress=False)
        callback = WandaPrune(num_samples=12, sequential=sequential, dataloader=loader())
        measured = getattr(trainer(callback), loop)(module, loader())
        assert same(module, by_hand)
        torch.testing.assert_close(measured, getattr(trainer(), loop)(by_hand, loader()), rtol=0, atol=0)
        with pytest.raises(AssertionError):
            torch.testing.assert_close(measured, getattr(trainer(), loop)(dense, loader()))
        assert [layer.name for layer in callback.report.layers] == LAYERS
        assert [layer.tokens for layer in callback.report.layers] == [12, 12, 12]
        assert share_of_zeros(module) == all_at(0.5)

    def test_it_prunes_once(self):
        module, callback = Net(), WandaPrune(num_samples=12)
        trainer(callback).validate(module, loader())
        report = callback.report
        with torch.no_grad():
            module.layers[0].weight[0].fill_(1)
        before = copy.deepcopy(module)
        for loop in ("validate", "test", "predict"):
            getattr(trainer(callback), loop)(module, loader())
        assert same(module, before)
        assert callback.report is report

    def test_another_module_is_pruned(self):
        callback = WandaPrune(num_samples=12)
        trainer(callback).validate(Net(), loader())
        report, other = callback.report, Net()
        gc.collect()
        trainer(callback).validate(other, loader())
        assert share_of_zeros(other) == all_at(0.5)
        assert callback.report is not report

    def test_pruned_by_validation_then_trained(self):
        module, callback = Net(), WandaPrune(num_samples=12)
        trainer(callback).validate(module, loader())
        report, pruned = callback.report, zeros(module)
        trainer(callback, max_steps=3).fit(module, loader())
        assert callback.report is report
        assert all(torch.equal(pruned[name], where) for name, where in zeros(module).items())

    def test_a_checkpoint_given_to_validate_is_pruned_after_loading(self, tmp_path):
        trained = Net()
        fit = trainer(max_steps=2)
        fit.fit(trained, loader())
        fit.save_checkpoint(tmp_path / "dense.ckpt")
        prune(trained, list(loader()), progress=False)
        module = Net()
        trainer(WandaPrune(num_samples=12)).validate(module, loader(), ckpt_path=tmp_path / "dense.ckpt")
        assert same(module, trained)

    def test_magnitude_needs_no_data(self):
        class Calibrated(Net):
            def calibration_step(self, batch):
                raise AssertionError

        module, by_hand = Calibrated(), Net()
        prune(by_hand, criterion="magnitude", pattern="unstructured_layer", progress=False)
        trainer(MagnitudePrune()).validate(module, loader())
        assert same(module, by_hand)

    def test_skip_leaves_dense(self):
        module = Net()
        trainer(WandaPrune(num_samples=12, pattern="1:4", sparsity=0.75, skip=["layers.2"])).validate(module, loader())
        assert share_of_zeros(module) == {**all_at(0.75), "layers.2.weight": 0.0}

    def test_nothing_else_changes(self):
        module = Net()
        module.layers[1].eval()  # one part in evaluation mode
        modes = {name: m.training for name, m in module.named_modules()}
        trainer(WandaPrune(num_samples=12)).validate(module, loader())
        assert {name: m.training for name, m in module.named_modules()} == modes
        assert hooks_of(module, SGD(module.parameters())) == []
        assert all(p.requires_grad and not p.is_inference() for p in module.parameters())
        module(torch.ones(1, 32)).sum().backward()


# ------------------------------------------------------------------------------------------------------- training


class Diary(Net):
    """Notes what it looks like before the sanity check, and before and at each step."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.sanity, self.steps, self.random = [], [], []

    def validation_step(self, batch, batch_idx):
        if self.trainer.sanity_checking:
            self.sanity.append(share_of_zeros(self))

    def training_step(self, batch, batch_idx):
        self.steps.append((share_of_zeros(self), batch[0].clone()))
        self.random.append(torch.get_rng_state())
        return super().training_step(batch, batch_idx)


class TestTraining:
    def test_prunes_before_the_first_step_and_after_the_sanity_check(self):
        module = Diary()
        trainer(WandaPrune(num_samples=12), max_epochs=1, num_sanity_val_steps=1).fit(module, loader(), loader())
        assert module.sanity == [all_at(0.0)]
        assert [shares for shares, _ in module.steps] == [all_at(0.5)] * 3

    @pytest.mark.parametrize("optimizer", [SGD, ADAMW], ids=["momentum", "adamw"])
    @pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (1, 0.5), (3, None), (2, 0.5)])
    def test_equals_a_loop_that_masks_by_hand(self, optimizer, accumulate, clip):
        by_hand, module = Net(), Net(optimizer)
        prune(by_hand, list(loader(24)), progress=False)
        pruned = zeros(by_hand)
        train_by_hand(by_hand, list(loader(24)) * 2, optimizer(by_hand.parameters()), accumulate, clip)
        options = {"accumulate_grad_batches": accumulate, "gradient_clip_val": clip, "max_epochs": 2}
        trainer(WandaPrune(num_samples=24), **options).fit(module, loader(24))
        for (name, weight), trained in zip(module.named_parameters(), by_hand.parameters(), strict=True):
            torch.testing.assert_close(weight, trained, msg=lambda text, name=name: f"{name}: {text}")
            if name in pruned:
                assert torch.equal(weight == 0, pruned[name])

    @pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
    @pytest.mark.parametrize("optimizer", [SGD, ADAMW], ids=["momentum", "adamw"])
    def test_zeros_and_their_moments_stay_exactly_zero(self, optimizer, precision):
        module = Net(optimizer)
        trainer(WandaPrune(num_samples=12), max_epochs=2, precision=precision, gradient_clip_val=0.5).fit(
            module, loader()
        )
        assert share_of_zeros(module) == all_at(0.5)
        for weight in module.parameters():
            if weight.ndim == 2:
                moments = [m for m in module.used_optimizer.state[weight].values() if m.shape == weight.shape]
                assert len(moments) == (1 if optimizer is SGD else 2)
                assert not any(moment[weight == 0].any() for moment in moments)
                assert all(moment[weight != 0].any() for moment in moments)

    def test_several_optimizers_stepped_by_hand(self):
        class Manual(Net):
            def __init__(self):
                super().__init__()
                self.automatic_optimization = False

            def training_step(self, batch, batch_idx):
                first, second = self.optimizers()
                self.manual_backward(self._loss(batch))
                first.step()
                if batch_idx % 2:
                    second.step()
                self.zero_grad()

            def configure_optimizers(self):
                return ADAMW(self.layers[:2].parameters()), SGD(self.layers[2:].parameters())

        module = Manual()
        trainer(WandaPrune(num_samples=12), max_epochs=2).fit(module, loader())
        assert share_of_zeros(module) == all_at(0.5)

    def test_frozen_layers_are_pruned_and_left(self):
        module = Net()
        module.layers[0].requires_grad_(False)
        trainer(WandaPrune(num_samples=12), max_epochs=1).fit(module, loader())
        assert share_of_zeros(module) == all_at(0.5)

    def test_without_keeping_zeros_they_come_back(self):
        module = Net()
        trainer(WandaPrune(num_samples=12, keep_zeros=False), max_epochs=1).fit(module, loader())
        assert all(share < 0.25 for share in share_of_zeros(module).values())  # dead units have no gradient

    def test_hooks_are_gone_after_training(self):
        module = Net()
        trainer(WandaPrune(num_samples=12), max_epochs=1).fit(module, loader())
        assert hooks_of(module, module.used_optimizer) == []
        module._loss(next(iter(loader()))).backward()
        assert all(weight.grad[weight == 0].any() for weight in module.parameters() if weight.ndim == 2)

    @pytest.mark.parametrize("callbacks", ["prune", "keep"])
    def test_hooks_are_gone_after_an_error_in_training(self, callbacks):
        class Broken(Net):
            def training_step(self, batch, batch_idx):
                if batch_idx == 1:
                    assert hooks_of(self, self.used_optimizer)
                    raise RuntimeError("out of paper")
                return super().training_step(batch, batch_idx)

        module = Broken()
        if callbacks == "keep":
            prune(module, criterion="magnitude", progress=False)
        callback = WandaPrune(num_samples=12) if callbacks == "prune" else KeepZeros()
        with pytest.raises(RuntimeError, match="out of paper"):
            trainer(callback, max_epochs=1).fit(module, loader())
        assert hooks_of(module, module.used_optimizer) == []

    @pytest.mark.parametrize("calibrate_on", ["train", "own"])
    def test_training_draws_the_same_random_numbers_as_without_pruning(self, calibrate_on):
        diaries = []
        for prunes in (False, True):
            L.seed_everything(3, verbose=False)
            own = loader(20, shuffle=True) if calibrate_on == "own" else None
            module = Diary()
            callbacks = [WandaPrune(num_samples=12, dataloader=own)] if prunes else []
            trainer(*callbacks, max_epochs=2).fit(module, loader(shuffle=True))
            diaries.append(module)
        without, with_pruning = diaries
        assert len(without.steps) == 6
        for (_, batch), (_, other) in zip(without.steps, with_pruning.steps, strict=True):
            assert torch.equal(batch, other)
        assert all(map(torch.equal, without.random, with_pruning.random))


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


class TestCheckpoints:
    def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(self, tmp_path):
        whole = Net(ADAMW)
        trainer(WandaPrune(num_samples=12), max_epochs=3).fit(whole, loader())
        first, callback = Net(ADAMW), WandaPrune(num_samples=12)
        fit = trainer(callback, max_epochs=1)
        fit.fit(first, loader())
        pruned = zeros(first)
        fit.save_checkpoint(tmp_path / "pruned.ckpt")
        resumed, again = Net(ADAMW), WandaPrune(num_samples=12)
        trainer(again, max_epochs=3).fit(resumed, loader(), ckpt_path=tmp_path / "pruned.ckpt")
        assert again.report is None
        assert all(torch.equal(where, pruned[name]) for name, where in zeros(resumed).items())
        assert same(resumed, whole)

    def test_a_checkpoint_is_ordinary(self, tmp_path):
        module, callback = Net(), WandaPrune(num_samples=12)
        fit = trainer(callback, max_epochs=1)
        fit.fit(module, loader())
        fit.save_checkpoint(tmp_path / "pruned.ckpt")
        checkpoint = torch.load(tmp_path / "pruned.ckpt", weights_only=True)
        assert checkpoint["state_dict"].keys() == Net().state_dict().keys()
        assert checkpoint["callbacks"].keys() == {callback.state_key}
        state = checkpoint["callbacks"][callback.state_key]
        assert state["zeros"] == {
            name: int(where.sum()) for name, where in zip(LAYERS, zeros(module).values(), strict=True)
        }
        assert state["unheld_zeros"] == {}
        for optimizer_state in checkpoint["optimizer_states"]:
            assert optimizer_state.keys() == {"state", "param_groups"}

    def test_a_pruned_checkpoint_is_measured_as_it_is(self, tmp_path):
        module = Net()
        fit = trainer(WandaPrune(num_samples=12), max_epochs=1)
        fit.fit(module, loader())
        fit.save_checkpoint(tmp_path / "pruned.ckpt")
        loaded = Net()
        trainer(WandaPrune(num_samples=12)).test(loaded, loader(), ckpt_path=tmp_path / "pruned.ckpt")
        assert same(loaded, module)

    def test_a_dense_checkpoint_is_pruned_when_training_goes_on(self, tmp_path):
        fit = trainer(max_epochs=1)
        fit.fit(Net(ADAMW), loader())
        fit.save_checkpoint(tmp_path / "dense.ckpt")
        module = Net(ADAMW)
        callback = WandaPrune(num_samples=12)
        trainer(callback, max_epochs=2).fit(module, loader(), ckpt_path=tmp_path / "dense.ckpt")
        assert share_of_zeros(module) == all_at(0.5)  # although the moments that were loaded are not zero there

    def test_two_callbacks_prune_two_parts(self, tmp_path):
        module = Net()
        first = WandaPrune(0.5, num_samples=12, skip=["layers.0"])
        second = MagnitudePrune(0.25, skip=["layers.2", "layers.4"])
        assert first.state_key != second.state_key
        assert first.state_key != WandaPrune(0.5, skip=["layers.2"]).state_key
        assert first.state_key == WandaPrune(0.5, skip=["layers.0"]).state_key
        assert WandaPrune(only=["layers.0"]).state_key != WandaPrune(only=["layers.2"]).state_key
        fit = trainer(first, second, max_epochs=1)
        fit.fit(module, loader())
        assert share_of_zeros(module) == {**all_at(0.5), "layers.0.weight": 0.25}
        fit.save_checkpoint(tmp_path / "both.ckpt")
        saved = torch.load(tmp_path / "both.ckpt", weights_only=True)["callbacks"]
        assert [list(state["zeros"]) for state in saved.values()] == [["layers.2", "layers.4"], ["layers.0"]]


# -------------------------------------------------------------------------------------------- calibration batches


class Recorder(Net):
    """Notes the batches that it is calibrated on."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def calibration_step(self, batch):
        self.seen.append(batch)
        return self(batch[0])


def tagged(tag, count=4):
    return DataLoader(TensorDataset(torch.full((count, 32), float(tag)), torch.zeros(count, dtype=torch.long)), count)


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


class TestCalibrationSource:
    @pytest.mark.parametrize(
        ("tag", "make", "data", "given"),
        [
            (1, Calibrating, lambda: TrainData(calibration_dataloader=2), tagged(1)),
            (2, Calibrating, lambda: TrainData(calibration_dataloader=2), None),
            (3, Calibrating, TrainData, None),
            (5, Training, TrainData, None),
            (6, Training, Data, None),
            (9, Recorder, Data, None),
        ],
        ids=[
            "given",
            "the datamodule's",
            "the module's",
            "train of the datamodule",
            "train of the module",
            "validation",
        ],
    )
    def test_order_when_validating(self, tag, make, data, given):
        module = make()
        trainer(WandaPrune(num_samples=4, dataloader=given)).validate(module, datamodule=data())
        assert [batch[0].unique().item() for batch in module.seen] == [tag]

    @pytest.mark.parametrize(("tag", "make"), [(3, Calibrating), (7, Recorder), (7, Training)])
    def test_order_when_training(self, tag, make):
        module = make()
        trainer(WandaPrune(num_samples=4), max_steps=1).fit(module, tagged(7), tagged(8))
        assert [batch[0].unique().item() for batch in module.seen] == [tag]

    @pytest.mark.parametrize("loop", ["validate", "test", "predict"])
    def test_loaders_at_hand(self, loop):
        module = Recorder()
        getattr(trainer(WandaPrune(num_samples=4)), loop)(module, tagged(8))
        assert [batch[0].unique().item() for batch in module.seen] == [8]

    @pytest.mark.parametrize("several", [lambda: [tagged(1), tagged(2)], lambda: {"a": tagged(1), "b": tagged(2)}])
    def test_several_loaders_are_refused(self, several):
        module, before = Net(), Net()
        with pytest.raises(MisconfigurationException, match=r"there are 2 val dataloaders"):
            trainer(WandaPrune(num_samples=4)).validate(module, several())
        assert same(module, before)
        trainer(WandaPrune(num_samples=4, dataloader=tagged(1))).validate(module, several())
        assert share_of_zeros(module) == all_at(0.5)

    def test_one_loader_in_a_list_is_no_question(self):
        module = Recorder()
        trainer(WandaPrune(num_samples=4)).validate(module, [tagged(8)])
        assert [batch[0].unique().item() for batch in module.seen] == [8]

    def test_batches_may_be_given_as_a_list(self):
        module = Recorder()
        batches = list(loader(12))
        trainer(WandaPrune(num_samples=12, dataloader=batches)).validate(module, loader())
        assert all(torch.equal(seen[0], batch[0]) for seen, batch in zip(module.seen, batches, strict=True))

    @pytest.mark.parametrize("sequential", ["block", "layer", "none"])
    def test_samples_are_counted_and_the_last_batch_is_cut(self, sequential):
        module = Recorder()
        callback = WandaPrune(num_samples=6, sequential=sequential, dataloader=loader(12))
        trainer(callback).validate(module, loader())
        assert [len(x) for x, _ in module.seen] == [4, 2]
        assert [len(labels) for _, labels in module.seen] == [4, 2]
        assert torch.equal(torch.cat([x for x, _ in module.seen]), samples(12).tensors[0][:6])
        assert {layer.tokens for layer in callback.report.layers} == {6}
        assert callback.report.config["calibration_batches"] == 2

    def test_fewer_samples_than_asked(self):
        module, callback = Net(), WandaPrune(num_samples=100)
        with pytest.warns(UserWarning, match=r"num_samples=100 were asked for, but .* has only 12: using these"):
            trainer(callback).validate(module, loader())
        assert {layer.tokens for layer in callback.report.layers} == {12}

    def test_no_samples_at_all(self):
        module = Net()
        empty = WandaPrune(dataloader=[])
        with (
            pytest.warns(UserWarning, match="has only 0"),
            pytest.raises(ValueError, match="at least one calibration batch"),
        ):
            trainer(empty).validate(module, loader())
        assert same(module, Net())


@pytest.mark.parametrize(
    "collate",
    [
        lambda rows: (torch.stack([x for x, _ in rows]), torch.stack([y for _, y in rows])),
        lambda rows: [torch.stack([x for x, _ in rows])],
        lambda rows: torch.stack([x for x, _ in rows]),
        lambda rows: {"x": torch.stack([x for x, _ in rows])},
        lambda rows: {
            "file": [str(y) for _, y in rows],
            "x": torch.stack([x for x, _ in rows]),
            "total": torch.tensor(4),
        },
    ],
    ids=["tuple", "list", "tensor", "mapping", "keys that forward does not take"],
)
def test_batches_of_all_kinds(collate):
    module, by_hand = Net(), Net()
    batches = DataLoader(samples(12), 4, collate_fn=collate)
    trainer(WandaPrune(num_samples=12, dataloader=batches)).validate(module, loader())
    prune(by_hand, list(loader()), progress=False)
    assert same(module, by_hand)


def test_a_mapping_that_forward_cannot_take():
    module = Net()
    with pytest.raises(ValueError, match=r"batches hold \['image'\], but Net.forward takes \['x'\].*calibration_step"):
        trainer(WandaPrune(num_samples=4, dataloader=[{"image": torch.ones(4, 32)}] * 2)).validate(module, loader())
    assert same(module, Net())


@pytest.mark.parametrize("batch", [object(), ("a", "b"), torch.tensor(1.0)])
def test_a_batch_without_samples(batch):
    with pytest.raises(MisconfigurationException, match="holds no tensor"):
        trainer(WandaPrune(num_samples=4, dataloader=[batch, batch])).validate(Net(), loader())


def test_a_module_without_forward_is_a_clear_error():
    class Steps(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(32, 32)

        def validation_step(self, batch, batch_idx):
            self.first(batch[0])

    with pytest.raises(MisconfigurationException, match=r"Steps has no forward .* calibration_step"):
        trainer(WandaPrune(num_samples=4)).validate(Steps(), loader())


def test_transfer_hooks_of_the_module_are_applied():
    class Transferred(Recorder):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return batch[0] + 1, batch[1]

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch[0] * 10, batch[1]

    module = Transferred()
    trainer(WandaPrune(num_samples=4)).validate(module, tagged(2))
    assert [batch[0].unique().item() for batch in module.seen] == [30]


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16-true", torch.bfloat16), ("64-true", torch.float64), ("bf16-mixed", torch.float32)]
)
def test_inputs_have_the_trainers_precision(precision, dtype):
    module = Recorder()
    outputs = []
    module.layers[0].register_forward_hook(lambda layer, args, output: outputs.append(output.dtype))
    trainer(WandaPrune(num_samples=4), precision=precision).validate(module, loader())
    assert [(x.dtype, labels.dtype) for x, labels in module.seen] == [(dtype, torch.int64)]
    assert set(outputs) == {torch.bfloat16 if precision == "bf16-mixed" else dtype}
    assert share_of_zeros(module) == all_at(0.5)


def test_layers_are_named_as_in_the_pruning_target():
    class Wrapper(Net):
        @property
        def pruning_target(self):
            return self.layers

    module, callback = Wrapper(), WandaPrune(num_samples=12, skip=["2"])
    trainer(callback, max_epochs=1).fit(module, loader())
    assert [layer.name for layer in callback.report.layers] == ["0", "4"]
    assert share_of_zeros(module) == {**all_at(0.5), "layers.2.weight": 0.0}


# --------------------------------------------------------------------------------------------- what is told to whom


@pytest.mark.parametrize("loop", ["validate", "fit"])
def test_metrics_reach_the_logger(tmp_path, loop):
    module, callback = Net(), WandaPrune(num_samples=12, skip=["layers.2"])
    run = trainer(callback, logger=CSVLogger(tmp_path), max_steps=3, log_every_n_steps=1)
    getattr(run, loop)(module, loader())
    (row,) = [row for row in rows_of(tmp_path) if row.get("sparsity/model")]
    assert row["step"] == "0"
    assert {name for name in row if name.startswith("sparsity/") and row[name]} == {
        "sparsity/model",
        "sparsity/pruned_layers",
        "sparsity/layers.0",
        "sparsity/layers.4",
    }
    assert float(row["sparsity/layers.0"]) == 0.5
    size = sum(p.numel() for p in module.parameters())
    assert float(row["sparsity/model"]) == pytest.approx((64 * 32 / 2 + 16 * 64 / 2) / size)


def test_the_report_is_written(tmp_path):
    callback = WandaPrune(num_samples=12, pattern=NM(2, 4), report_dir=tmp_path / "reports")
    trainer(callback).validate(Net(), loader())
    report = json.loads((tmp_path / "reports" / "pruning_report.json").read_text())
    assert report["sparsity"] == 0.5
    assert [layer["name"] for layer in report["layers"]] == LAYERS
    assert report["config"]["pattern"] == {"name": "NM", "n": 2, "m": 4}


@pytest.mark.parametrize("loop", ["validate", "fit"])
def test_progress_is_shown_with_the_trainers_bar(capfd, loop):
    options = {"max_steps": 1} if loop == "fit" else {}
    getattr(trainer(WandaPrune(num_samples=12), **options), loop)(Net(), loader())
    assert "Pruning" not in "".join(capfd.readouterr())
    getattr(trainer(WandaPrune(num_samples=12), enable_progress_bar=True, **options), loop)(Net(), loader())
    assert "Pruning 3/3 done" in capfd.readouterr().err


# --------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "2:4", "sparsity": 0.7}, "2:4 has a sparsity of 0.5, but 0.7"),
        ({"pattern": NM(4, 8), "sparsity": 0.75}, "4:8 has a sparsity of 0.5"),
        ({"pattern": "4:2"}, "4:2"),
        ({"pattern": "diagonal"}, "pattern must be one of unstructured.* but it is 'diagonal'"),
        ({"sparsity": 1.0}, "at least 0 and below 1, but it is 1.0"),
        ({"sparsity": -0.1}, "at least 0 and below 1"),
        ({"sparsity": float("nan")}, "at least 0 and below 1"),
        ({"num_samples": 0}, "num_samples is at least 1, but 0"),
        ({"sequential": "row"}, "sequential must be one of block, layer, none, but it is 'row'"),
        ({"criterion": "luck"}, "criterion must be one of wanda, magnitude.* but it is 'luck'"),
        ({"allocation": "luck"}, "allocation must be one of uniform.* but it is 'luck'"),
        ({"solver": "luck"}, "solver must be one of .* but it is 'luck'"),
    ],
)
def test_bad_arguments_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        PruningCallback(**options)


def test_names_and_objects_mean_the_same():
    assert (
        PruningCallback(0.5, pattern="2:4").config == PruningCallback(0.5, criterion=Wanda(), pattern=NM(2, 4)).config
    )
    assert WandaPrune(0.75, pattern="1:4").config == PruningCallback(0.75, pattern=NM(1, 4)).config


def test_a_skip_that_matches_nothing_names_the_nearest():
    module = Net()
    with pytest.raises(ValueError, match=r"skip='layers.1' matches no matrix of the model; the nearest is 'layers"):
        trainer(WandaPrune(num_samples=4, skip=["layers.1"]), max_epochs=1).fit(module, loader())
    assert same(module, Net())


@pytest.mark.parametrize("callback", [WandaPrune, KeepZeros])
def test_strategies_that_cannot_be_pruned_are_refused_by_name(callback):
    class Elsewhere(SingleDeviceStrategy):
        """Stands for one that spreads the model in a way of its own."""

    spread = trainer(strategy=Elsewhere("cpu"))
    callback().setup(spread, Net(), "fit")
    spread.strategy.__class__ = FSDPStrategy  # which itself wants a GPU
    with pytest.raises(MisconfigurationException, match=r"FSDPStrategy spreads .* use strategy='ddp'"):
        callback().setup(spread, Net(), "fit")


class Interrupting(Net):
    """Ctrl-C, while a batch is in the second layer."""

    def forward(self, x):
        if self.trainer.validating:
            assert threading.current_thread() is not threading.main_thread()
            os.kill(os.getpid(), signal.SIGINT)
        return super().forward(x)


def test_ctrl_c_while_pruning_leaves_no_hooks_and_no_threads():
    handler, threads = signal.getsignal(signal.SIGINT), threading.active_count()
    module = Interrupting()
    try:
        with pytest.raises(SystemExit) as stop:
            trainer(WandaPrune(num_samples=12)).validate(module, loader())
    finally:
        signal.signal(signal.SIGINT, handler)
    assert isinstance(stop.value.__context__, KeyboardInterrupt)
    assert threading.active_count() == threads
    assert hooks_of(module, SGD(module.parameters())) == []
    assert same(module, Net())


# ---------------------------------------------------------------------------------------- with our modules and data


def text_module():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:128]
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return CausalLMModule(ZOO["llama"].build(), PreTrainedTokenizerFast(tokenizer_object=tokenizer), lr=1e-3)


@pytest.mark.parametrize("loop", ["validate", "fit"])
def test_a_language_model_is_saved_at_two_of_four(tmp_path, loop):
    module = text_module()
    data = TextDataModule(module.tokenizer, seqlen=32, num_samples=8, limit=8)
    callback = WandaPrune(pattern="2:4", num_samples=8)
    run = trainer(callback, max_epochs=1)
    getattr(run, loop)(module, datamodule=data)
    names = [layer.name for layer in callback.report.layers]
    assert names[0] == "model.layers.0.self_attn.q_proj"
    assert len(names) == 14
    assert {layer.tokens for layer in callback.report.layers} == {8 * 32}
    module.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name in names:
        groups = (loaded.get_submodule(name).weight != 0).reshape(-1, 4)
        assert (groups.sum(dim=1) == 2).all()
    assert loaded.lm_head.weight.all()
    assert same(loaded, module.model)


def test_an_image_classifier_is_trained_with_its_zeros():
    sizes = {"in_chans": 1, "img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    module = ImageClassifierModule("vit_tiny_patch16_224", False, 10, model_kwargs=sizes)
    dense = copy.deepcopy(module)
    callback = WandaPrune(pattern="2:4", num_samples=256, sequential="none")
    run = trainer(callback, max_epochs=1)
    run.fit(module, datamodule=ImageDataModule("digits", batch_size=128, num_samples=256))
    assert run.callback_metrics["val_accuracy"] > 0
    assert not torch.equal(module.model.head.weight, dense.model.head.weight)
    assert [layer.name for layer in callback.report.layers][:2] == ["blocks.0.attn.qkv", "blocks.0.attn.proj"]
    for layer in callback.report.layers:
        groups = (module.model.get_submodule(layer.name).weight != 0).reshape(-1, 4)
        assert (groups.sum(dim=1) == 2).all()


# ---- what once went wrong: calibration beside the loops of Lightning


def test_predict_sees_every_batch_of_the_loader_it_calibrated_on():
    module = Net()
    batches = DataLoader(samples(), batch_size=4)  # by keyword: Lightning builds the loader again for predict
    predictions = trainer(WandaPrune(num_samples=12)).predict(module, batches)
    assert share_of_zeros(module) == all_at(0.5)
    assert torch.equal(torch.cat(predictions), module(samples().tensors[0]))


def test_predict_with_our_data_modules():
    images = ImageClassifierModule("test_vit", pretrained=False, num_classes=10, model_kwargs={"in_chans": 1})
    data = ImageDataModule("digits", images, num_samples=8, image_size=160, batch_size=180)
    predicting = trainer(WandaPrune(num_samples=8, sequential="none"))
    assert sum(len(part) for part in predicting.predict(images, data)) == 360


@pytest.mark.parametrize("loop", ["fit", "validate"])
def test_persistent_workers_lose_no_batch(loop):
    seen = []

    class Counting(Net):
        def training_step(self, batch, batch_idx):
            seen.append(len(batch[0]))
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            seen.append(len(batch[0]))

    batches = DataLoader(samples(20), batch_size=4, num_workers=1, persistent_workers=True)
    getattr(trainer(WandaPrune(num_samples=6), max_epochs=2), loop)(Counting(), batches)
    assert len(seen) == (10 if loop == "fit" else 5)


def test_the_order_of_a_loader_with_its_own_generator_stays():
    orders = []
    for callbacks in ([], [WandaPrune(num_samples=6)]):
        seen = []

        class Listening(Net):
            def training_step(self, batch, batch_idx, seen=seen):
                seen.extend(batch[1].tolist())
                return super().training_step(batch, batch_idx)

        shuffled = DataLoader(samples(), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(3))
        trainer(*callbacks, max_epochs=1).fit(Listening(), shuffled)
        orders.append(seen)
    assert orders[0] == orders[1]


def test_dense_weights_loaded_afterwards_are_pruned_again(tmp_path):
    module, callback = Net(), WandaPrune(num_samples=12)
    saving = trainer()
    saving.validate(module, loader())
    saving.save_checkpoint(tmp_path / "dense.ckpt")
    trainer(callback).validate(module, loader())
    trainer(callback).validate(module, loader(), ckpt_path=tmp_path / "dense.ckpt")
    assert share_of_zeros(module) == all_at(0.5)


def test_transfer_hooks_of_the_data_module_are_applied():
    class Shifted(L.LightningDataModule):
        def calibration_dataloader(self):
            return loader()

        def val_dataloader(self):
            return loader()

        def on_before_batch_transfer(self, batch, dataloader_idx):
            return batch[0] + 3, batch[1]

    module, expected = Net(), Net()
    trainer(WandaPrune(num_samples=12)).validate(module, datamodule=Shifted())
    prune(expected, [(x + 3, y) for x, y in loader()], progress=False)
    assert same(module, expected)


def test_a_list_of_one_batch_is_a_dataloader():
    module, expected = Net(), Net()
    batch = samples()[:]
    trainer(WandaPrune(num_samples=12, dataloader=[batch])).validate(module, loader())
    prune(expected, [batch], progress=False)
    assert same(module, expected)


class Labelled(NamedTuple):
    x: torch.Tensor
    label: torch.Tensor


def test_a_named_tuple_stays_one_when_it_is_cut():
    class Named(Net):
        def calibration_step(self, batch):
            self(batch.x)

    module = Named()
    batches = [Labelled(*samples(4).tensors), Labelled(*samples(4, seed=1).tensors)]
    callback = WandaPrune(num_samples=6, dataloader=batches)
    trainer(callback).validate(module, loader())
    assert {layer.tokens for layer in callback.report.layers} == {6}


def test_a_callback_can_be_copied_and_pickled():
    callback = WandaPrune(num_samples=12)
    trainer(callback).validate(Net(), loader())
    assert copy.deepcopy(callback).report == callback.report
    assert pickle.loads(pickle.dumps(callback)).report == callback.report


def test_nothing_is_said_without_a_progress_bar(capsys):
    trainer(WandaPrune(num_samples=12)).validate(Net(), loader(), verbose=False)
    assert "WandaPrune" not in "".join(capsys.readouterr())
