"""A resumed run equals an uninterrupted one to the bit, also after SIGKILL, and its checkpoints are plain data."""

import os
import signal
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from support import forks
from support.callbacks import (
    ADAMW,
    LAYERS,
    SGD,
    Net,
    PrintedSteps,
    Resumable,
    SaveAt,
    all_at,
    fit_module,
    killed_and_resumed,
    loader,
    run_loop,
    same,
    share_of_zeros,
    state,
    to_quarters,
    trainer,
    wanda,
    zeros,
)
from support.layers import assert_same
from support.pairwise import with_nightly
from support.quiet import prune
from support.refusals import refuses
from timm.optim import Lion
from torch import nn

from wanda_lightning import CubicSchedule, KeepZeros, PruningCallback, WandaPrune


def fit_resumable(module, *callbacks, max_steps=10, **options):
    """Fit on batches that a resumed run continues with."""
    fit_module(module, *callbacks, data=Resumable(), max_steps=max_steps, **options)


@pytest.fixture
def gradual(tmp_path):
    """A callback after three steps, with an average, and the checkpoints of steps 2 and 3."""
    module = made("sign")
    callback = Counted(at_step=2)
    fit_resumable(module, callback, EMAWeightAveraging(), SaveAt(tmp_path, 2, 3), max_steps=3)
    saved = {step: torch.load(tmp_path / f"{step}.ckpt", weights_only=True) for step in (2, 3)}
    return SimpleNamespace(callback=callback, saved=saved)


class TestCheckpoints:
    def test_weights_and_the_state_of_the_optimizer_are_ordinary(self, gradual):
        assert gradual.saved[3]["state_dict"].keys() == Net().state_dict().keys()
        (optimizer_state,) = gradual.saved[3]["optimizer_states"]
        assert optimizer_state.keys() == {"state", "param_groups"}

    def test_the_state_of_the_callback_counts_the_zeros_right_after_pruning(self, gradual):
        saved = gradual.saved[2]
        assert gradual.callback.state_key == "Counted{'skip': []}"
        own = saved["callbacks"]["Counted{'skip': []}"]
        assert (own["last_asked_step"], own["awaits_validation"]) == (2, False)
        assert own["zeros"] == {
            name: int((saved["state_dict"][f"{name}.weight"] == 0).sum()) for name in LAYERS
        }
        assert own["unheld_zeros"] == {}

    def test_a_pruned_checkpoint_is_measured_as_it_is(self, tmp_path):
        module = Net()
        fit_module(module, wanda(), SaveAt(tmp_path, 3), max_epochs=1)
        loaded = Net()
        run_loop("test", loaded, wanda(), ckpt_path=tmp_path / "3.ckpt")
        assert same(loaded, module)

    def test_a_dense_checkpoint_is_pruned_when_training_goes_on(self, tmp_path):
        fit_module(Net(ADAMW), SaveAt(tmp_path, 3), max_epochs=1)
        module = Net(ADAMW)
        fit_module(module, wanda(), max_epochs=2, ckpt_path=tmp_path / "3.ckpt")
        # Although the moments that were loaded are not zero there.
        assert share_of_zeros(module) == all_at(0.5)


class Counted(WandaPrune):
    """Records the steps at which it pruned."""

    def __init__(self, sparsity=0.5, **options):
        super().__init__(sparsity, num_samples=24, dataloader=list(loader(24)), **options)
        self.pruned_at = []

    def should_prune(self, trainer):
        due = super().should_prune(trainer)
        if due:
            self.pruned_at.append(trainer.global_step)
        return due


OPTIMIZERS = {
    "adamw": ADAMW,
    "momentum": SGD,
    "sign": partial(Lion, lr=0.25, betas=(0.0, 0.0)),  # see to_quarters
    "lion": partial(Lion, lr=0.01, weight_decay=0.1),
}


def made(optimizer):
    module = Net(OPTIMIZERS[optimizer])
    if optimizer == "sign":
        to_quarters(module)
    return module


WHEN = {  # the options, and the steps at which it prunes
    "at_step": ({"at_step": 5}, [5]),
    "at_start": ({}, [0]),
    "cubic": ({"schedule": CubicSchedule(0, 9, every=3)}, [3, 6, 9]),
    "not kept": ({"at_step": 2, "keep_zeros": False}, [2]),
}
OPTIONS = {
    "accumulation": {"accumulate_grad_batches": 2},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-true": {"precision": "bf16-true"},
    "clipping": {"gradient_clip_val": 0.1},
}


def callbacks_of(options, *callbacks):
    average = EMAWeightAveraging(decay=0.8)
    if options == "ema":
        return [*callbacks, average]
    return [average, *callbacks] if options == "ema first" else callbacks


@pytest.mark.filterwarnings(
    "ignore:Found .* in the checkpoint"
)  # Lightning says how it resumes averages
@pytest.mark.parametrize(
    ("optimizer", "when", "options"),
    with_nightly(
        [
            ("adamw", "at_step", "ema"),
            ("adamw", "not kept", "plain"),
            ("momentum", "at_step", "bf16-mixed"),
            ("momentum", "cubic", "ema first"),
            ("sign", "cubic", "accumulation"),
        ],
        [
            ("adamw", "at_start", "clipping"),
            ("sign", "at_start", "ema"),
            ("lion", "cubic", "bf16-true"),
        ],
    ),
)
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, optimizer, when, options):
    choices, pruned_at = WHEN[when]
    steps = {"max_steps": 12, **OPTIONS.get(options, {})}
    whole = made(optimizer)
    callback = Counted(**choices)
    saves = (2, 6, 8)  # of six batches an epoch
    fit_resumable(whole, *callbacks_of(options, callback), SaveAt(tmp_path, *saves), **steps)
    assert callback.pruned_at == pruned_at
    assert when == "not kept" or all(where.float().mean() >= 0.5 for where in zeros(whole).values())
    for step in saves:
        resumed = made(optimizer)
        again = Counted(**choices)
        path = tmp_path / f"{step}.ckpt"
        fit_resumable(resumed, *callbacks_of(options, again), **steps, ckpt_path=path)
        assert again.pruned_at == [at for at in pruned_at if at > step]
        assert again.report.layers == callback.report.layers
        # To the last field, from the checkpoint.
        assert again.pruned_at or again.report == callback.report
        assert_same(state(resumed), state(whole))


def test_a_checkpoint_written_by_another_callback_right_before_pruning(tmp_path):
    whole = made("adamw")
    resumed = made("adamw")
    fit_resumable(whole, SaveAt(tmp_path, 5), Counted(at_step=5), max_steps=8)
    assert not any(
        (torch.load(tmp_path / "5.ckpt")["state_dict"][name] == 0).any() for name in all_at(0.5)
    )
    callback = Counted(at_step=5)
    fit_resumable(resumed, callback, max_steps=8, ckpt_path=tmp_path / "5.ckpt")
    assert callback.pruned_at == [5]
    assert_same(state(resumed), state(whole))


def test_the_same_callback_goes_back_to_an_earlier_checkpoint(tmp_path):
    whole = made("sign")
    resumed = made("sign")
    callback = Counted(at_step=5)
    fit_resumable(whole, callback, SaveAt(tmp_path, 3, 7))
    for step, pruned_at in ((7, [5]), (3, [5, 5]), (7, [5, 5])):
        fit_resumable(resumed, callback, ckpt_path=tmp_path / f"{step}.ckpt")
        assert callback.pruned_at == pruned_at
        assert_same(state(resumed), state(whole))


def test_two_callbacks_on_two_parts_keep_their_own_state(tmp_path):
    def both():
        first = Counted(0.5, at_step=3, skip=["layers.0"])
        return first, Counted(0.25, at_step=6, skip=["layers.2", "layers.4"])

    whole = made("adamw")
    fit_resumable(whole, *both(), SaveAt(tmp_path, 2, 4, 6, 8))
    assert share_of_zeros(whole) == {**all_at(0.5), "layers.0.weight": 0.25}
    for step in (2, 4, 6, 8):
        resumed = made("adamw")
        first, second = both()
        fit_resumable(resumed, second, first, ckpt_path=tmp_path / f"{step}.ckpt")
        assert first.pruned_at == [at for at in [3] if at > step]
        # The reports are of the checkpoint, or of a pruning.
        assert (first.report.sparsity, second.report.sparsity) == (0.5, 0.25)
        assert_same(state(resumed), state(whole))


def pruned_elsewhere(optimizer, skip=()):
    module = made(optimizer)
    prune(module, criterion="magnitude", pattern="unstructured", skip=skip)
    return module


class Breaking(Net):
    """Fails once, in its sixth step."""

    breaks = True

    def training_step(self, batch, batch_idx):
        if self.breaks and self.trainer.global_step == 5:
            raise RuntimeError("out of paper")
        return super().training_step(batch, batch_idx)


def test_a_run_after_an_interrupted_one_prunes_at_its_own_step():
    callback = wanda(at_step=4, calibrate_on="validation")
    with pytest.raises(RuntimeError, match="out of paper"):
        trainer(callback, max_steps=6).fit(Breaking(), loader(), loader())

    module = Net()
    pruned = []  # after each epoch of three steps
    module.on_train_epoch_end = lambda: pruned.append(share_of_zeros(module) == all_at(0.5))
    trainer(callback, max_steps=6).fit(module, loader(), loader())
    assert pruned == [False, True]


@pytest.mark.parametrize(
    "make", [KeepZeros, lambda: PruningCallback(pattern="unstructured", method="magnitude")]
)
def test_a_checkpoint_that_is_written_after_an_exception(tmp_path, make):
    def run(breaks, batches, path=None):
        module = Breaking(OPTIMIZERS["sign"])
        to_quarters(module)
        module.breaks = breaks
        if make is KeepZeros:
            prune(module, criterion="magnitude", pattern="unstructured")
        fit = trainer(make(), max_steps=8)
        with pytest.raises(RuntimeError, match="out of paper") if breaks else nullcontext():
            fit.fit(module, batches, ckpt_path=path)
        return module, fit

    whole, _ = run(False, Resumable())
    run(True, Resumable())[1].save_checkpoint(tmp_path / "broken.ckpt")
    batches = Resumable()
    # The batch that failed comes again.
    batches.load_state_dict = lambda state: setattr(batches, "done", 5)
    resumed, _ = run(False, batches, tmp_path / "broken.ckpt")
    assert_same(resumed, whole)


@pytest.mark.parametrize(
    ("loop", "first", "second", "message"),
    [
        (
            "fit",
            {"sparsity": 0.5},
            {"sparsity": 0.75},
            r"'sparsity': 0\.5\b.*but they are.*'sparsity': 0\.75",
        ),
        (
            "test",
            {"pattern": "2:4"},
            {"pattern": "unstructured"},
            "'NM', 'n': 2, 'm': 4.*but they are.*'Unstructured'",
        ),
    ],
)
def test_a_checkpoint_of_another_sparsity_or_pattern(tmp_path, loop, first, second, message):
    module = made("adamw")
    fit_module(module, wanda(**first), SaveAt(tmp_path, 2), max_steps=2)
    callback = wanda(**second)
    run = getattr(trainer(callback, max_steps=4), loop)
    with refuses(f"WandaPrune wrote with .*{message}"):
        run(made("adamw"), loader(), ckpt_path=tmp_path / "2.ckpt")
    assert callback.report is None


def test_a_report_of_another_version_stops_nothing(tmp_path):
    """Training resumes without it."""
    whole = made("adamw")
    fit_resumable(whole, Counted(at_step=2), SaveAt(tmp_path, 3), max_steps=6)
    saved = torch.load(tmp_path / "3.ckpt", weights_only=True)
    (own,) = [state for name, state in saved["callbacks"].items() if "Counted" in name]
    own["of_a_later_version"] = 1
    own["report"] = own["report"].replace('"zeros"', '"zeroes"')
    torch.save(saved, tmp_path / "changed.ckpt")
    resumed = made("adamw")
    callback = Counted(at_step=2)
    with pytest.warns(UserWarning, match="argument: .zeros."):
        fit_resumable(resumed, callback, max_steps=6, ckpt_path=tmp_path / "changed.ckpt")
    assert (callback.pruned_at, callback.report) == ([], None)
    assert_same(state(resumed), state(whole))


class Killed(Net):
    """May kill its own process while the second stage of pruning is half done."""

    def __init__(self, is_killed):
        super().__init__(ADAMW)
        self.is_killed = is_killed

    def calibration_step(self, batch):
        self.layers[:3](batch[0])
        shares = share_of_zeros(self)
        if (
            self.is_killed
            and self.trainer.global_step == 6
            and shares["layers.0.weight"] > shares["layers.4.weight"]
        ):
            os.kill(os.getpid(), signal.SIGKILL)
        return self(batch[0])


def attempt(folder, is_killed):
    """Continue from the last checkpoint, if there is one, and write the result."""
    module = Killed(is_killed)
    callback = WandaPrune(
        num_samples=24, dataloader=list(loader(24)), sequential="layer", **WHEN["cubic"][0]
    )
    run = trainer(
        callback,
        ModelCheckpoint(folder, every_n_train_steps=1, save_last=True),
        PrintedSteps(),
        max_steps=12,
        enable_checkpointing=True,
    )
    run.fit(module, Resumable(), ckpt_path="last" if any(folder.glob("last*.ckpt")) else None)
    torch.save(state(module), folder / "final.pt")


@forks.IN_ONE_WORKER
def test_a_killed_and_restarted_run_equals_an_uninterrupted_one(tmp_path):
    first_step, whole, resumed = killed_and_resumed(tmp_path, attempt)
    assert first_step == "step 5"
    assert_same(resumed, whole)


@pytest.mark.parametrize(
    ("optimizer", "dead"), [("sign", ()), ("adamw", ()), ("adamw", ("layers.4",))]
)
def test_keep_zeros_alone(tmp_path, optimizer, dead):
    """After a resume, it holds what it held before: no zeros of a layer that was all zeros and has dead units now."""
    whole = pruned_elsewhere(optimizer, skip=dead)
    resumed = made(optimizer)
    for name in dead:
        nn.init.zeros_(whole.get_submodule(name).weight)
    fit_resumable(whole, KeepZeros(), SaveAt(tmp_path, 1, 7))
    assert (torch.load(tmp_path / "1.ckpt")["state_dict"]["layers.4.weight"] == 0).any()
    for step in (1, 7):
        fit_resumable(resumed, KeepZeros(), ckpt_path=tmp_path / f"{step}.ckpt")
        assert_same(state(resumed), state(whole))


def test_keep_zeros_from_a_checkpoint_of_a_run_that_only_measured(tmp_path):
    module = pruned_elsewhere("adamw")
    measured = trainer(KeepZeros())
    measured.validate(module, loader(), verbose=False)
    measured.save_checkpoint(tmp_path / "pruned.ckpt")
    resumed = made("adamw")
    fit_module(resumed, KeepZeros(), max_steps=3, ckpt_path=tmp_path / "pruned.ckpt")
    assert share_of_zeros(resumed) == all_at(0.5)
