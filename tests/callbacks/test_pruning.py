"""PruningCallback in the loops of Lightning, against `prune` and training loops by hand."""

import csv
import os
import pickle
import signal
import threading
from copy import deepcopy
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from greenlet import getcurrent, greenlet
from lightning.pytorch.loggers import CSVLogger
from support.callbacks import (
    ADAMW,
    SGD,
    Manual,
    Net,
    Notes,
    Recorder,
    Steps,
    TwoOptimizers,
    all_at,
    fit_module,
    hooks_of,
    loader,
    pruned_by_hand,
    run_loop,
    same,
    share_of_zeros,
    trainer,
    validate_module,
    wanda,
    zeros,
    zeros_in,
)
from support.held_zeros import OPTIMIZERS, LooksAtZeros, Witness
from support.layers import assert_same
from support.quiet import prune
from support.refusals import refuses
from support.zoo import number_of_weights

from wanda_lightning import CubicSchedule, KeepZeros, LinearSchedule, PruningCallback, WandaPrune
from wanda_lightning.callbacks.schedules import PruningState


class TestMeasuring:
    @pytest.mark.parametrize(
        ("loop", "sequential"), [("validate", "block"), ("test", "layer"), ("predict", "none")]
    )
    def test_the_model_is_pruned_as_by_prune_and_measured_then(self, loop, sequential):
        by_hand = Net()
        prune(by_hand, list(loader()), 0.5, sequential=sequential)
        module = Net()
        measured = run_loop(loop, module, wanda(sequential=sequential, dataloader=loader()))
        assert same(module, by_hand)
        assert_same(measured, run_loop(loop, by_hand))
        # It can be trained afterward.
        assert hooks_of(module, SGD(module.parameters())) == []
        assert all(p.requires_grad and not p.is_inference() for p in module.parameters())

    def test_layers_are_named_as_in_the_pruning_target(self):
        class Wrapper(Net):
            pruning_target = property(lambda self: self.layers)

        module = Wrapper()
        callback = wanda(skip=["2"])
        validate_module(module, callback)
        assert [layer.name for layer in callback.report.layers] == ["0", "4"]
        assert share_of_zeros(module) == {**all_at(0.5), "layers.2.weight": 0.0}

    @pytest.mark.parametrize(("first", "when"), [("validate", {}), ("fit", {"at_step": 3})])
    def test_it_prunes_once(self, first, when):
        module = Net()
        callback = wanda(**when)
        run_loop(first, module, callback, max_steps=5)
        module.layers[0].weight.data[0].fill_(1)
        report = callback.report
        before = deepcopy(module)
        for loop in ("validate", "test", "predict"):
            run_loop(loop, module, callback)
        assert same(module, before)
        fit_module(module, callback, max_steps=5)
        assert_same(zeros(module), zeros(before))
        assert callback.report is report

    def test_magnitude_needs_no_data(self):
        module = Net()
        by_hand = Net()
        module.calibration_step = lambda batch: pytest.fail("a batch was read")
        prune(by_hand, criterion="magnitude", pattern="unstructured_layer")
        validate_module(module, PruningCallback(method="magnitude"))
        assert same(module, by_hand)


class Diary(Recorder):
    """Also records where it is zero in the sanity check and at each step, and the state of the random numbers."""

    def __init__(self):
        super().__init__()
        self.sanity = []
        self.steps = []
        self.random = []

    def validation_step(self, batch, batch_idx):
        if self.trainer.sanity_checking:
            self.sanity.append(share_of_zeros(self))

    def training_step(self, batch, batch_idx):
        self.steps.append(share_of_zeros(self))
        self.random.append(torch.get_rng_state())
        return super().training_step(batch, batch_idx)


class TestTraining:
    def test_prunes_before_the_first_step_and_after_the_sanity_check(self):
        module = Diary()
        trainer(wanda(), max_epochs=1, num_sanity_val_steps=1).fit(module, loader(), loader())
        assert module.sanity == [all_at(0.0)]
        assert module.steps == [all_at(0.5)] * 3

    def test_layers_that_were_replaced_and_added_are_pruned(self):
        class Grown(Net):
            def on_train_batch_end(self, *_):
                if self.global_step == 2:
                    self.layers[2] = deepcopy(self.layers[2])
                    self.layers.append(torch.nn.Linear(16, 16))

        module = Grown()
        fit_module(module, wanda(at_step=4), max_epochs=2)
        assert share_of_zeros(module) == {**all_at(0.5), "layers.5.weight": 0.5}

    @pytest.mark.parametrize("callback", [wanda(), KeepZeros()])
    def test_hooks_are_gone_after_an_error_in_training(self, callback):
        class Broken(Net):
            def training_step(self, batch, batch_idx):
                assert hooks_of(self, self.used_optimizer)
                raise RuntimeError("out of paper")

        module = Broken()
        if isinstance(callback, KeepZeros):
            prune(module, criterion="magnitude")
        with pytest.raises(RuntimeError, match="out of paper"):
            fit_module(module, callback, max_epochs=1)
        assert hooks_of(module, module.used_optimizer) == []

    @pytest.mark.parametrize(("calibrate_on", "at_step"), [("train", 0), ("own", 0), ("train", 4)])
    def test_training_draws_the_same_random_numbers_as_without_pruning(self, calibrate_on, at_step):
        own = loader(20, shuffle=True) if calibrate_on == "own" else None
        without = Diary()
        with_pruning = Diary()
        for module, callbacks in (
            (without, []),
            (with_pruning, [wanda(dataloader=own, at_step=at_step)]),
        ):
            L.seed_everything(3, verbose=False)
            fit_module(module, *callbacks, data=loader(shuffle=True), max_epochs=2)
        assert len(without.trained) == 6
        assert_same(with_pruning.trained, without.trained)
        assert_same(with_pruning.random, without.random)


@pytest.mark.parametrize(
    ("loop", "when"),
    [("validate", {"at_step": 3}), ("predict", {"schedule": CubicSchedule(0, 4, every=2)})],
)
def test_measuring_before_training_warns_and_sees_the_dense_model(loop, when):
    module = Net()
    dense = Net()
    callback = wanda(**when)
    with pytest.warns(
        UserWarning, match=r"prunes during training, by .*, so the model evaluated now is dense"
    ):
        measured = run_loop(loop, module, callback)
    assert same(module, dense)
    assert callback.report is None
    assert_same(measured, run_loop(loop, dense))


def adamw():
    return Net(ADAMW)


# How the module is made, batches that are accumulated, when to prune, the fraction of the sparsity after each stage by
# optimizer step, and the sparsity.
STAGES = [
    (adamw, 1, {"at_step": 7}, {7: 1.0}, 0.5),  # in the second epoch
    # Six batches an epoch: the last step accumulates two.
    (Net, 4, {"at_step": 2}, {2: 1.0}, 0.5),
    (Manual, 1, {"at_step": 4}, {4: 1.0}, 0.5),
    (TwoOptimizers, 1, {"at_step": 6}, {6: 1.0}, 0.5),
    (adamw, 2, {"schedule": CubicSchedule(2, 8, every=2)}, {4: 19 / 27, 6: 26 / 27, 8: 1.0}, 0.7),
    (
        adamw,
        2,
        {"schedule": LinearSchedule(1, 9, every=2)},
        {3: 0.25, 5: 0.5, 7: 0.75, 9: 1.0},
        0.5,
    ),
    (adamw, 2, {"schedule": Steps((0, 0.25), (5, 0.25), (9, 1.0))}, {0: 0.25, 9: 1.0}, 0.7),
]


@pytest.fixture(scope="module", params=STAGES)
def fits(request):
    """A dense fit, and one that prunes: the weights before and after the callback by step."""
    make, accumulate, when, stages, sparsity = request.param
    dense = Notes()
    before = Notes()
    after = Notes()
    options = {"max_epochs": 4, "max_steps": 12, "accumulate_grad_batches": accumulate}
    fit_module(make(), dense, count=24, **options)
    module = make()
    start = deepcopy(module.state_dict())
    fit_module(
        module, before, WandaPrune(sparsity, num_samples=24, **when), after, count=24, **options
    )
    reached = {step: share * sparsity for step, share in stages.items()}
    return SimpleNamespace(
        dense=dense.at,
        before=before.at,
        after={0: pruned_by_hand(start, reached.get(0, 0.0)).state_dict(), **after.at},
        reached=reached,
    )


def test_training_is_that_of_the_dense_run_until_the_first_stage(fits):
    assert fits.before.keys() == fits.dense.keys()
    for step, weights in fits.before.items():
        if 0 < step <= min(fits.reached):  # a stage at 0 is done before the first batch
            assert_same(weights, fits.dense[step])


def test_each_stage_does_what_prune_does(fits):
    for step in fits.reached.keys() & fits.before.keys():
        expected = pruned_by_hand(fits.before[step], fits.reached[step])
        assert_same(fits.after[step], expected.state_dict())


def test_zeros_stay_and_others_come_only_with_a_stage(fits):
    previous = zeros_in(fits.after[0])
    for step, weights in fits.after.items():
        now = zeros_in(weights)
        for name, where in now.items():
            assert not (previous[name] & ~where).any(), f"{name} revived weights at {step}"
            assert step in fits.reached or torch.equal(previous[name], where)
        previous = now
    # The kept weights train on.
    pruned = fits.after[max(fits.reached)]["layers.0.weight"]
    assert not torch.equal(weights["layers.0.weight"], pruned)


class Asked(WandaPrune):
    """Prunes from a step on, and records the steps at which it is called."""

    def __init__(self, first, **options):
        super().__init__(num_samples=24, **options)
        self.first = first
        self.asked = []

    def should_prune(self, trainer):
        self.asked.append(trainer.global_step)
        return trainer.global_step >= self.first and super().should_prune(trainer)


class TestShouldPrune:
    @pytest.mark.parametrize(("make", "accumulate"), [(Net, 3), (Manual, 1)])
    def test_is_called_once_for_each_optimizer_step(self, make, accumulate):
        callback = Asked(7)
        after = Notes()
        options = {"max_steps": 10, "accumulate_grad_batches": accumulate}
        # Validation loops do not call it.
        options |= {"val_check_interval": 2, "num_sanity_val_steps": 1}
        trainer(callback, after, **options).fit(make(), loader(24), loader())
        assert callback.asked == list(range(11))
        pruned = [
            step for step, weights in after.at.items() if zeros_in(weights)["layers.0.weight"].any()
        ]
        assert pruned == [7, 8, 9, 10]

    def test_the_schedule_still_gives_the_sparsity(self):
        callback = Asked(3, sparsity=0.5, schedule=LinearSchedule(0, 4, every=1))
        after = Notes()
        fit_module(Net(), callback, after, count=24, max_steps=6)
        shares = {
            step: round(zeros_in(w)["layers.0.weight"].float().mean().item(), 3)
            for step, w in after.at.items()
        }
        assert shares == {1: 0, 2: 0, 3: 0.375, 4: 0.5, 5: 0.5, 6: 0.5}

    def test_never_pruning_leaves_a_dense_model_and_warns(self):
        module = Net()
        dense = Net()
        with pytest.warns(
            UserWarning, match="to sparsity 0 instead of 0.5, because training ended at .* step 3"
        ):
            fit_module(module, Asked(100), max_steps=3)
        fit_module(dense, max_steps=3)
        assert same(module, dense)


class Interrupting(Net):
    """Ctrl-C, while a batch is in the second layer."""

    def forward(self, x):
        # The first passes run alone, before those that wait for each other.
        if self.trainer.validating and isinstance(getcurrent(), greenlet) and getcurrent().parent:
            assert isinstance(getcurrent().parent, greenlet)
            assert threading.current_thread() is threading.main_thread()
            os.kill(os.getpid(), signal.SIGINT)
        return super().forward(x)


def test_ctrl_c_while_pruning_leaves_no_hooks():
    handler = signal.getsignal(signal.SIGINT)
    module = Interrupting()
    try:
        with pytest.raises(SystemExit) as stop:
            validate_module(module, wanda())
    finally:
        signal.signal(signal.SIGINT, handler)
    assert isinstance(stop.value.__context__, KeyboardInterrupt)
    assert hooks_of(module, SGD(module.parameters())) == []
    assert same(module, Net())


def test_weights_that_became_nan_in_training_are_refused_before_one_is_pruned():
    module = Net()
    module.on_train_batch_start = lambda batch, index: (
        module.layers[0].weight.data[0].fill_(torch.nan)[0]
    )
    with refuses(r"layers.0 has weights that are NaN or infinite"):
        fit_module(module, wanda(at_step=3), max_steps=5)
    assert share_of_zeros(module) == all_at(0.0)


def test_a_callback_can_be_copied_and_pickled():
    callback = wanda()
    validate_module(Net(), callback)
    assert deepcopy(callback).report == callback.report
    assert pickle.loads(pickle.dumps(callback)).report == callback.report


@pytest.mark.parametrize(("loop", "sparsity"), [("fit", 0.25), ("validate", 0.5)])
def test_a_second_dense_model_with_some_natural_zeros_is_pruned(loop, sparsity):
    callback = WandaPrune(sparsity, num_samples=12, at_step=3 if loop == "fit" else 0)
    for share in (0, 0.02, 0.1):
        module = Net(ADAMW)
        with torch.no_grad():
            for layer in module.layers[::2]:
                layer.weight.mul_(torch.rand_like(layer.weight) >= share)
        run_loop(loop, module, callback, max_steps=4)
        assert share_of_zeros(module) == all_at(sparsity)


def test_two_callbacks_on_the_same_layers_keep_the_zeros_of_both():
    module = LooksAtZeros(OPTIMIZERS["momentum"], from_step=5)
    first = PruningCallback(0.25, method="magnitude")
    fit_module(
        module, Witness(), first, WandaPrune(0.5, num_samples=24, at_step=5), count=24, max_steps=12
    )
    assert share_of_zeros(module) == all_at(0.5)


def test_a_layer_that_a_later_stage_does_not_reach_keeps_its_zeros():
    state = PruningState({})
    # A layer of zeros only was initialized so, and trains.
    dead = SimpleNamespace(name="dead", zeros=8, sparsity=1.0)
    for names in ("ab", "a"):
        layers = [SimpleNamespace(name=name, zeros=4, sparsity=0.5) for name in names]
        state.record(SimpleNamespace(layers=[*layers, dead]), 0.5)
    assert state.zeros == {"a": 4, "b": 4}


@pytest.mark.parametrize("when", [{"at_step": 2}, {"schedule": LinearSchedule(0, 40, every=10)}])
def test_a_dry_run_prunes_before_the_first_step(when):
    module = Diary()
    trainer(wanda(0.75, **when), fast_dev_run=2).fit(module, loader(24), loader())
    assert module.steps == [all_at(0.75)] * 2


def test_each_stage_logs_the_sparsities_of_the_model_and_of_each_layer(tmp_path):
    module = Net()
    callback = wanda(skip=["layers.2"], schedule=LinearSchedule(0, 4, every=2))
    run = trainer(callback, logger=CSVLogger(tmp_path), max_steps=6, log_every_n_steps=1)
    run.fit(module, loader())
    (file,) = tmp_path.rglob("metrics.csv")
    rows = csv.DictReader(file.read_text().splitlines())
    stages = [row for row in rows if row.get("sparsity/model")]
    reached = [(row["step"], row["sparsity/pruned_layers"]) for row in stages]
    assert reached == [("2", "0.25"), ("4", "0.5")]

    expected = {
        "sparsity/model": (64 * 32 / 2 + 16 * 64 / 2) / number_of_weights(module),
        "sparsity/pruned_layers": 0.5,
        "sparsity/layers.0": 0.5,
        "sparsity/layers.4": 0.5,
    }
    last = {name: float(value) for name, value in stages[-1].items() if name in expected}
    assert last == pytest.approx(expected)
    assert callback.report.metrics() == pytest.approx(expected)
    # Other callbacks can monitor them.
    monitored = {name: float(value) for name, value in run.callback_metrics.items()}
    assert monitored == pytest.approx(expected)


@pytest.mark.parametrize("shown", [True, False])
def test_progress_is_shown_only_if_the_trainer_shows_any(capfd, caplog, shown):
    run = trainer(wanda(), enable_progress_bar=shown)
    run.validate(Net(), loader(), verbose=False)
    assert ("Pruning 3/3 done" in capfd.readouterr().err) == shown
    assert ("WandaPrune: 3 layers" in caplog.text) == shown
