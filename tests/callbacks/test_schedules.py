"""Pruning at a step and by a schedule, against `prune` by hand on the weights of that moment and formulas."""

import copy
import json
import math
import sys
from itertools import pairwise
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from support.callbacks import (  # noqa: F401
    ADAMW,
    SGD,
    Net,
    all_at,
    loader,
    one_thread,
    rows_of,
    same,
    samples,
    share_of_zeros,
    trainer,
    zeros,
)
from torch.utils.data import DataLoader, IterableDataset

from wanda_lightning import (
    NM,
    CubicSchedule,
    LinearSchedule,
    MagnitudePrune,
    OneShot,
    PruningCallback,
    Schedule,
    WandaPrune,
    prune,
)
from wanda_lightning.cli import main

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # they would only slow down these tests
    pytest.mark.filterwarnings("ignore:.*but have no `val_dataloader`"),  # some tests only train
]


class Notes(L.Callback):
    """All weights as they are when a batch ends, by the number of optimizer steps done."""

    def __init__(self):
        self.at = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step not in self.at:  # accumulating
            self.at[trainer.global_step] = copy.deepcopy(pl_module.state_dict())


class Manual(Net):
    """Steps by hand, after every second batch."""

    def __init__(self, optimizer=SGD):
        super().__init__(optimizer)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(self._loss(batch))
        if batch_idx % 2:
            self.optimizers().step()
            self.optimizers().zero_grad()


class TwoOptimizers(Net):
    """Two optimizers that step one after the other: two steps a batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self._loss(batch))
            optimizer.step()

    def configure_optimizers(self):
        return ADAMW(self.layers[:2].parameters()), SGD(self.layers[2:].parameters())


def pruned_by_hand(weights, sparsity, **options):
    module = Net()
    module.load_state_dict(weights)
    prune(module, list(loader(24)), sparsity, progress=False, **options)
    return module


def zeros_in(weights):
    return {name: weight == 0 for name, weight in weights.items() if weight.ndim == 2}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class TestAtStep:
    @pytest.mark.parametrize(
        ("make", "accumulate", "at_step"),
        [
            (Net, 1, 1),
            (Net, 1, 7),
            (lambda: Net(ADAMW), 1, 5),
            (Net, 2, 4),
            (lambda: Net(ADAMW), 3, 3),
            (Net, 4, 2),  # six batches an epoch: the last step of an epoch accumulates two
            (Manual, 1, 4),
            (TwoOptimizers, 1, 6),
        ],
        ids=["first", "next epoch", "adamw", "two batches", "three batches", "short epoch end", "manual", "optimizers"],
    )
    def test_dense_training_then_what_prune_does_by_hand(self, make, accumulate, at_step):
        dense, before, after = Notes(), Notes(), Notes()
        options = {"max_epochs": 4, "accumulate_grad_batches": accumulate}
        trainer(dense, **options).fit(make(), loader(24))
        module, callback = make(), WandaPrune(0.5, num_samples=24, at_step=at_step)
        trainer(before, callback, after, **options).fit(module, loader(24))
        assert all(equal(before.at[step], dense.at[step]) for step in before.at if step <= at_step)
        assert before.at.keys() == dense.at.keys()
        assert max(before.at) > at_step
        by_hand = pruned_by_hand(dense.at[at_step], 0.5)
        assert equal(after.at[at_step], by_hand.state_dict())
        for step in after.at:
            expected = zeros(by_hand) if step >= at_step else zeros_in(dense.at[step])
            assert equal(zeros_in(after.at[step]), expected)
        assert not equal(after.at[max(after.at)], by_hand.state_dict())
        assert equal(zeros(module), zeros(by_hand))

    def test_a_step_inside_a_batch_waits_for_its_end(self):
        dense, before, after = Notes(), Notes(), Notes()
        trainer(dense, max_epochs=1).fit(TwoOptimizers(), loader(24))
        trainer(before, WandaPrune(num_samples=24, at_step=3), after, max_epochs=1).fit(TwoOptimizers(), loader(24))
        assert equal(before.at[4], dense.at[4])
        assert equal(after.at[4], pruned_by_hand(dense.at[4], 0.5).state_dict())

    def test_the_last_step(self):
        dense, module = Net(), Net()
        trainer(max_steps=5).fit(dense, loader(24))
        trainer(WandaPrune(num_samples=24, at_step=5), max_steps=5).fit(module, loader(24))
        assert same(module, pruned_by_hand(dense.state_dict(), 0.5))

    @pytest.mark.parametrize("options", [{"pattern": "2:4"}, {"sequential": "none"}, {"skip": ["layers.2"]}])
    def test_other_choices(self, options):
        dense, after = Notes(), Notes()
        trainer(dense, max_steps=4).fit(Net(), loader(24))
        trainer(WandaPrune(num_samples=24, at_step=3, **options), after, max_steps=4).fit(Net(), loader(24))
        assert equal(after.at[3], pruned_by_hand(dense.at[3], 0.5, **options).state_dict())

    def test_data_without_a_length(self):
        class Stream(IterableDataset):
            def __iter__(self):
                return iter(samples(24))

        after = Notes()
        batches = DataLoader(Stream(), batch_size=4)
        callback = WandaPrune(num_samples=24, at_step=3)
        trainer(callback, after, max_epochs=2).fit(Net(), batches)
        assert not any(where.any() for where in zeros_in(after.at[2]).values())
        for step in range(3, 13):
            assert equal(zeros_in(after.at[step]), zeros_in(after.at[3]))
        assert {layer.sparsity for layer in callback.report.layers} == {0.5}
        with pytest.raises(MisconfigurationException, match="training ends at 4"):
            trainer(WandaPrune(at_step=5), max_steps=4).fit(Net(), batches)

    @pytest.mark.parametrize("loop", ["validate", "test", "predict"])
    @pytest.mark.parametrize(
        "when", [{"at_step": 3}, {"schedule": CubicSchedule(0, 4, every=2)}], ids=["at_step", "cubic"]
    )
    def test_measuring_before_training_warns_and_sees_the_dense_model(self, loop, when):
        module, dense, callback = Net(), Net(), WandaPrune(num_samples=12, **when)
        with pytest.warns(UserWarning, match=r"WandaPrune prunes while training, by .*: measuring a dense model"):
            measured = getattr(trainer(callback), loop)(module, loader())
        assert same(module, dense)
        assert callback.report is None
        torch.testing.assert_close(measured, getattr(trainer(), loop)(dense, loader()), rtol=0, atol=0)

    def test_measuring_after_training_neither_warns_nor_prunes(self):
        module, callback = Net(), WandaPrune(num_samples=12, at_step=3)
        trainer(callback, max_steps=5).fit(module, loader())
        trained, report = copy.deepcopy(module), callback.report
        trainer(callback).validate(module, loader())
        assert same(module, trained)
        assert callback.report is report

    def test_a_second_fit_of_the_pruned_model_goes_on_without_pruning(self):
        module, callback = Net(), WandaPrune(num_samples=12, at_step=3)
        trainer(callback, max_steps=5).fit(module, loader())
        pruned, report = zeros(module), callback.report
        trainer(callback, max_steps=5).fit(module, loader())
        assert equal(zeros(module), pruned)
        assert callback.report is report

    def test_a_second_model_is_pruned_at_its_own_step(self):
        callback, before, after = WandaPrune(num_samples=12, at_step=3), Notes(), Notes()
        trainer(callback, max_steps=5).fit(Net(), loader())
        trainer(before, callback, after, max_steps=5).fit(Net(ADAMW), loader())
        assert not any(where.any() for where in zeros_in(before.at[3]).values())
        assert {where.float().mean().item() for where in zeros_in(after.at[3]).values()} == {0.5}


# -------------------------------------------------------------------------------------------------------- schedules


def cubic(progress):
    """Zhu & Gupta 2017, eq. 1, from an initial sparsity of 0 to a final one of 1."""
    initial, final = 0.0, 1.0
    return final + (initial - final) * (1 - progress) ** 3


CURVES = {CubicSchedule: cubic, LinearSchedule: lambda progress: progress}


class Steps(Schedule):
    """A user's own."""

    def __init__(self, *stages):
        self.own = stages

    @property
    def stages(self):
        return self.own


class TestLaws:
    @pytest.mark.parametrize("kind", [CubicSchedule, LinearSchedule])
    @given(start=st.integers(0, 30), length=st.integers(1, 40), every=st.integers(1, 50))
    def test_stages_are_the_formula_at_each_step(self, kind, start, length, every):
        schedule, end = kind(start, start + length, every), start + length
        expected = [
            (step, CURVES[kind]((step - start) / length))
            for step in range(start + 1, end + 1)
            if (step - start) % every == 0 or step == end
        ]
        assert [step for step, _ in schedule.stages] == [step for step, _ in expected]
        assert [share for _, share in schedule.stages] == pytest.approx([share for _, share in expected], abs=1e-12)
        assert schedule.stages[-1] == (end, 1.0)
        schedule.check()

    @given(data=st.data(), steps=st.lists(st.integers(0, 30), min_size=1, max_size=6, unique=True).map(sorted))
    def test_share_is_that_of_the_latest_stage(self, data, steps):
        inner = st.lists(st.floats(0.01, 1), min_size=len(steps) - 1, max_size=len(steps) - 1)
        schedule = Steps(*zip(steps, [*sorted(data.draw(inner)), 1.0], strict=True))
        schedule.check()
        due = None
        for step in range(max(steps) + 3):
            for stage, share in schedule.stages:
                if stage == step:
                    due = share
            assert schedule.share(step) == due

    @given(
        st.lists(
            st.tuples(st.integers(-2, 8), st.sampled_from([-0.5, 0.0, 0.25, 0.5, 1.0, 1.5])), min_size=0, max_size=4
        )
    )
    def test_check_takes_what_rises_to_one_and_refuses_the_rest(self, stages):
        fine = bool(stages) and stages[0][0] >= 0 and stages[-1][1] == 1
        for (step, share), (next_step, next_share) in pairwise(stages):
            fine = fine and step < next_step and share <= next_share
        fine = fine and all(0 < share <= 1 for _, share in stages)
        if fine:
            Steps(*stages).check()
            assert PruningCallback(schedule=Steps(*stages)).schedule.stages == tuple(stages)
        else:
            with pytest.raises(ValueError, match="rise"):
                PruningCallback(schedule=Steps(*stages))

    def test_one_shot(self):
        assert OneShot(7).stages == ((7, 1.0),)
        assert OneShot() == OneShot(0) == WandaPrune().schedule
        assert WandaPrune(at_step=7).schedule == OneShot(7)


@pytest.mark.parametrize("sparsity", [0.5, 0.7])
@pytest.mark.parametrize(
    ("schedule", "stages"),
    [
        (CubicSchedule(2, 8, every=2), {4: cubic(1 / 3), 6: cubic(2 / 3), 8: 1.0}),
        (CubicSchedule(0, 5, every=3), {3: cubic(3 / 5), 5: 1.0}),
        (LinearSchedule(1, 9, every=2), {3: 0.25, 5: 0.5, 7: 0.75, 9: 1.0}),
        (OneShot(4), {4: 1.0}),
        (Steps((0, 0.25), (5, 0.25), (9, 1.0)), {0: 0.25, 9: 1.0}),
    ],
    ids=["cubic", "uneven", "linear", "one shot", "own"],
)
def test_each_stage_scores_anew_and_zeros_stay(schedule, stages, sparsity):
    before, after, module = Notes(), Notes(), Net(ADAMW)
    callback = WandaPrune(sparsity, num_samples=24, schedule=schedule)
    first = pruned_by_hand(module.state_dict(), sparsity * stages[0]) if 0 in stages else Net()
    trainer(before, callback, after, max_steps=12, accumulate_grad_batches=2).fit(module, loader(24))
    reached, previous = stages.get(0, 0.0) * sparsity, zeros(first)
    for step in range(1, 13):
        if step in stages:
            reached = stages[step] * sparsity
            by_hand = pruned_by_hand(before.at[step], reached)
            assert equal(after.at[step], by_hand.state_dict())
        now = zeros_in(after.at[step])
        for name, where in now.items():
            d_in = where.shape[1]
            assert where.sum(dim=1).tolist() == [int(d_in * reached)] * len(where)
            assert not (previous[name] & ~where).any(), f"{name} revived weights at step {step}"
            assert step in stages or torch.equal(previous[name], where)
        previous = now
    assert reached == sparsity
    assert equal(zeros(module), previous)


def test_a_schedule_with_layerwise_groups_and_no_data():
    after, module = Notes(), Net()
    trainer(MagnitudePrune(0.6, schedule=LinearSchedule(0, 4, every=2)), after, max_steps=6).fit(module, loader(24))
    for step, sparsity in {1: 0.0, 2: 0.3, 3: 0.3, 4: 0.6, 6: 0.6}.items():
        for where in zeros_in(after.at[step]).values():
            assert where.sum() == int(where.numel() * sparsity)


def test_each_stage_reaches_the_logger(tmp_path):
    callback = WandaPrune(0.5, num_samples=12, schedule=LinearSchedule(0, 4, every=2))
    trainer(callback, logger=CSVLogger(tmp_path), max_steps=6, log_every_n_steps=1).fit(Net(), loader())
    rows = [row for row in rows_of(tmp_path) if row.get("sparsity/pruned_layers")]
    assert [(int(row["step"]), float(row["sparsity/pruned_layers"])) for row in rows] == [(2, 0.25), (4, 0.5)]


# --------------------------------------------------------------------------------------------- a moment of one's own


class Asked(WandaPrune):
    """Notes when it was asked."""

    def __init__(self, **options):
        super().__init__(num_samples=24, **options)
        self.asked = []

    def should_prune(self, trainer):
        self.asked.append(trainer.global_step)
        return self.answer(trainer)

    def answer(self, trainer):
        return super().should_prune(trainer)


class AtSeven(Asked):
    def answer(self, trainer):
        return trainer.global_step == 7


class AtPlateau(Asked):
    """Once the loss that the module logs is no better than it was."""

    def __init__(self):
        super().__init__()
        self.losses = []

    def answer(self, trainer):
        self.losses.append(trainer.callback_metrics.get("train_loss", torch.tensor(math.inf)).item())
        return self.report is None and len(self.losses) > 2 and self.losses[-1] >= self.losses[-2]


class Always(Asked):
    def answer(self, trainer):
        return True


class Logging(Net):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss)
        return loss


class TestShouldPrune:
    @pytest.mark.parametrize("accumulate", [1, 3])
    def test_is_asked_once_for_each_optimizer_step(self, accumulate):
        callback, after = AtSeven(), Notes()
        trainer(callback, after, max_steps=10, accumulate_grad_batches=accumulate).fit(Net(), loader(24))
        assert callback.asked == list(range(11))
        assert [step for step, weights in after.at.items() if zeros_in(weights)["layers.0.weight"].any()] == [
            step for step in after.at if step >= 7
        ]

    def test_is_not_asked_by_validation_while_training(self):
        callback = Asked(at_step=4)
        options = {"max_steps": 6, "val_check_interval": 2, "num_sanity_val_steps": 1}
        trainer(callback, **options).fit(Net(), loader(24), loader())
        assert callback.asked == list(range(7))

    def test_is_asked_by_manual_optimization_after_batches_that_stepped(self):
        callback = AtSeven()
        module = Manual()
        trainer(callback, max_steps=8).fit(module, loader(24))
        assert callback.asked == list(range(9))
        assert share_of_zeros(module) == all_at(0.5)

    def test_may_look_at_what_is_logged(self):
        callback, before, after = AtPlateau(), Notes(), Notes()
        trainer(before, callback, after, max_epochs=3).fit(Logging(), loader(24))
        (pruned_at,) = [step for step in after.at if not equal(after.at[step], before.at[step])]
        best = math.inf
        for step, loss in enumerate(callback.losses):
            if step >= 2 and loss >= best:
                break
            best = loss
        assert 2 <= step == pruned_at < len(after.at)
        assert equal(after.at[step], pruned_by_hand(before.at[step], 0.5).state_dict())

    def test_pruning_at_every_step_does_not_compound(self):
        callback, after = Always(sparsity=0.5), Notes()
        trainer(callback, after, max_steps=5).fit(Net(), loader(24))
        for weights in after.at.values():
            assert {where.float().mean().item() for where in zeros_in(weights).values()} == {0.5}
            assert equal(zeros_in(weights), zeros_in(after.at[1]))  # what is zero scores lowest

    def test_the_schedule_still_says_how_far(self):
        class FromThree(Asked):
            def answer(self, trainer):
                return trainer.global_step >= 3 and super().answer(trainer)

        callback, after = FromThree(sparsity=0.5, schedule=LinearSchedule(0, 4, every=1)), Notes()
        trainer(callback, after, max_steps=6).fit(Net(), loader(24))
        shares = {step: round(zeros_in(w)["layers.0.weight"].float().mean().item(), 3) for step, w in after.at.items()}
        assert shares == {1: 0, 2: 0, 3: 0.375, 4: 0.5, 5: 0.5, 6: 0.5}

    def test_never_is_a_dense_model_and_a_warning(self):
        class Never(Asked):
            def answer(self, trainer):
                return False

        module, dense, callback = Net(), Net(), Never()
        with pytest.warns(UserWarning, match="measuring a dense model"):
            trainer(callback).validate(module, loader())
        with pytest.warns(UserWarning, match=r"ended at optimizer step 3, before .* to 0.5: it reached 0"):
            trainer(callback, max_steps=3).fit(module, loader())
        trainer(max_steps=3).fit(dense, loader())
        assert same(module, dense)


# --------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("when", "options", "end"),
    [
        ({"at_step": 1000}, {"max_steps": 10}, 10),
        ({"at_step": 7}, {"max_epochs": 2, "accumulate_grad_batches": 2}, 6),  # three steps an epoch
        ({"at_step": 5}, {"max_epochs": 2, "accumulate_grad_batches": 4}, 4),  # two, of four batches and of two
        ({"at_step": 13}, {"max_epochs": 2}, 12),
        ({"at_step": 5}, {"max_epochs": 2, "limit_train_batches": 2}, 4),
        ({"at_step": 5}, {"max_epochs": 2, "max_steps": 4}, 4),
        ({"schedule": CubicSchedule(0, 13, every=2)}, {"max_epochs": 2}, 12),
        ({"schedule": Steps((1, 0.5), (20, 1.0))}, {"max_epochs": 2}, 12),
    ],
)
def test_a_stage_after_the_end_of_training_is_refused_at_the_start(when, options, end):
    module = Net()
    steps = []
    module.register_forward_pre_hook(lambda *_: steps.append(1))
    with pytest.raises(MisconfigurationException, match=rf"but training ends at {end}: .*Prune earlier, or train"):
        trainer(WandaPrune(num_samples=24, **when), **options).fit(module, loader(24))
    assert same(module, Net())
    assert not steps


@pytest.mark.parametrize(
    ("when", "message"),
    [
        ({"at_step": 3, "skip": ["no_such_layer"]}, "skip='no_such_layer' matches no matrix"),
        ({"at_step": 3, "pattern": "2:5", "sparsity": 0.6}, "is not a multiple of 5"),
        ({"schedule": CubicSchedule(0, 4, every=2), "skip": ["*"]}, "nothing to prune"),
    ],
)
def test_what_a_later_stage_would_refuse_is_refused_at_the_start(when, message):
    module = Net()
    with pytest.raises(ValueError, match=message):
        trainer(WandaPrune(num_samples=24, **when), max_steps=6).fit(module, loader(24))
    assert same(module, Net())


def test_a_dry_run_of_a_few_steps_is_not_refused():
    module = Net()
    with pytest.warns(UserWarning, match="training ended at optimizer step 1, before WandaPrune had pruned"):
        trainer(WandaPrune(num_samples=24, at_step=1000), fast_dev_run=True).fit(module, loader(24))


@pytest.mark.parametrize("options", [{"max_steps": 4}, {"max_epochs": 2, "accumulate_grad_batches": 3}])
def test_a_stage_at_the_end_of_training_is_not_refused(options):
    module = Net()
    trainer(WandaPrune(num_samples=24, at_step=4), **options).fit(module, loader(24))
    assert share_of_zeros(module) == all_at(0.5)


@pytest.mark.parametrize("make", [Manual, TwoOptimizers])
def test_manual_optimization_is_refused_by_max_steps(make):
    module = make()
    with pytest.raises(MisconfigurationException, match="ends at optimizer step 9, but training ends at 8"):
        trainer(WandaPrune(num_samples=24, at_step=9), max_steps=8).fit(module, loader(24))
    assert same(module, Net())


@pytest.mark.parametrize("max_epochs", [1, 3])
def test_manual_optimization_is_not_held_to_one_step_a_batch(max_epochs):
    module = TwoOptimizers()  # twelve steps an epoch of six batches
    trainer(WandaPrune(num_samples=24, at_step=12), max_epochs=max_epochs).fit(module, loader(24))
    assert share_of_zeros(module) == all_at(0.5)


@pytest.mark.parametrize(
    ("when", "message"),
    [
        ({"at_step": -1}, r"rise from 0 or later, but OneShot\(step=-1\) has \[-1\]"),
        ({"at_step": 3, "schedule": OneShot(3)}, r"at_step=3 and schedule=OneShot\(step=3\) are two answers"),
        ({"schedule": Steps()}, "rise from 0"),
        ({"schedule": Steps((3, 0.5), (2, 1.0))}, r"has \[3, 2\]"),
        ({"schedule": Steps((2, 0.5), (2, 1.0))}, r"has \[2, 2\]"),
        ({"schedule": Steps((1, 0.8), (2, 0.5), (3, 1.0))}, r"never decreases.*but they are \[0.8, 0.5, 1.0\]"),
        ({"schedule": Steps((1, 0.25), (2, 0.5))}, r"ends at what was asked for.*but they are \[0.25, 0.5\]"),
        ({"schedule": Steps((1, 0.0), (2, 1.0))}, "should rise to 1"),
        ({"schedule": Steps((1, 0.5), (2, 1.5))}, "should rise to 1"),
        (
            {"pattern": NM(2, 4), "schedule": CubicSchedule(0, 4, every=2)},
            r"has one sparsity.*CubicSchedule\(.*at_step",
        ),
        ({"pattern": "1:4", "sparsity": 0.75, "schedule": Steps((1, 0.5), (2, 1.0))}, "has one sparsity"),
    ],
)
def test_bad_moments_are_refused_at_once(when, message):
    with pytest.raises(ValueError, match=message):
        WandaPrune(**when)


def test_a_share_that_is_no_number_is_refused_at_once():
    with pytest.raises(ValueError, match="rise to 1"):
        WandaPrune(schedule=Steps((1, math.nan), (2, 1.0)))


@pytest.mark.parametrize("kind", [CubicSchedule, LinearSchedule])
@pytest.mark.parametrize("values", [(-1, 4, 2), (4, 4, 1), (5, 4, 1), (0, 4, 0), (0, 4, -2)])
def test_bad_schedules_are_refused_at_once(kind, values):
    start, end, every = values
    with pytest.raises(ValueError, match=rf"start_step={start}, end_step={end}, every={every}"):
        kind(start, end, every)


def test_two_of_four_in_one_stage():
    module = Net()
    trainer(WandaPrune(num_samples=24, pattern="2:4", schedule=OneShot(2)), max_steps=4).fit(module, loader(24))
    assert share_of_zeros(module) == all_at(0.5)
    assert all((where.reshape(-1, 4).sum(dim=1) == 2).all() for where in zeros(module).values())


# --------------------------------------------------------------------------------------------------------- by a recipe


class Tiny(Net):
    """What a recipe names by its class path; it brings its data."""

    shares: list

    def __init__(self, lr: float = 0.1):
        super().__init__(lambda parameters: torch.optim.SGD(parameters, lr=lr))
        Tiny.shares = []

    def train_dataloader(self):
        return loader(24)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        Tiny.shares.append(share_of_zeros(self)["layers.0.weight"])


@pytest.fixture
def fit(tmp_path, monkeypatch):
    """Runs `wanda-lightning fit --config` with a pruning callback in an empty folder, and returns its status."""
    from lightning.pytorch import _logger

    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning 2.6 under jsonargparse 4.53
    monkeypatch.setattr(sys, "argv", ["wanda-lightning"])  # LightningCLI warns where there are two command lines
    monkeypatch.chdir(tmp_path)
    level = _logger.level

    def run(*arguments, name="wanda_lightning.WandaPrune", **pruning):
        options = {
            "model": {"class_path": f"{Tiny.__module__}.{Tiny.__qualname__}"},
            "trainer": {
                "accelerator": "cpu",
                "devices": 1,
                "max_steps": 8,
                "logger": False,
                "enable_checkpointing": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "callbacks": [
                    {"class_path": name, "init_args": {"num_samples": 24, "report_dir": "out", **pruning}},
                ],
            },
        }
        Path("recipe.yaml").write_text(yaml.safe_dump(options))
        try:
            return main(["fit", "--config", "recipe.yaml", *arguments])
        except SystemExit as stop:
            return stop.code

    yield run
    _logger.setLevel(level)


CUBIC = {"class_path": "wanda_lightning.CubicSchedule", "init_args": {"start_step": 0, "end_step": 6, "every": 3}}
ONE_SHOT = {"class_path": "wanda_lightning.OneShot", "init_args": {"step": 5}}


@pytest.mark.parametrize(
    ("pruning", "shares"),
    [
        ({"schedule": CUBIC}, [0, 0, 0.438, 0.438, 0.438, 0.5, 0.5, 0.5]),
        ({"schedule": ONE_SHOT}, [0, 0, 0, 0, 0.5, 0.5, 0.5, 0.5]),
        ({"at_step": 7}, [0, 0, 0, 0, 0, 0, 0.5, 0.5]),
        ({"schedule": CUBIC, "name": "wanda_lightning.PruningCallback"}, [0, 0, 0.438, 0.438, 0.438, 0.5, 0.5, 0.5]),
    ],
    ids=["cubic", "one shot", "at_step", "base class"],
)
def test_a_recipe_prunes_by_its_schedule(fit, pruning, shares):
    assert fit(**pruning) == 0
    assert Tiny.shares == shares
    assert json.loads(Path("out/pruning_report.json").read_text())["sparsity"] == 0.5


def test_a_recipes_schedule_can_be_overridden(fit):
    assert fit("--trainer.callbacks.init_args.schedule.init_args.end_step", "3", schedule=CUBIC) == 0
    assert Tiny.shares == [0, 0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("pruning", "message"),
    [
        ({"at_step": 9}, "OneShot(step=9) ends at optimizer step 9, but training ends at 8"),
        ({"at_step": 3, "schedule": ONE_SHOT}, "two answers to one question"),
        ({"schedule": CUBIC, "pattern": "2:4"}, "has one sparsity"),
        ({"schedule": {**CUBIC, "init_args": {"start_step": 5, "end_step": 2, "every": 1}}}, "end_step=2, every=1"),
    ],
)
def test_a_recipe_is_refused(fit, capsys, pruning, message):
    assert fit(**pruning) in (1, 2)
    assert message in capsys.readouterr().err
    assert not Path("out").exists()
