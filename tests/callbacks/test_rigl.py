"""RigL moves zeros at its steps only, keeps their number, and a resumed run goes on exactly."""

import copy
from functools import partial

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from support.callbacks import (
    ADAMW,
    SGD,
    Net,
    Resumable,
    SaveAt,
    all_at,
    equal,
    hooks_of,
    loader,
    share_of_zeros,
    state,
    trainer,
    zeros,
)
from support.held_zeros import precision_of

from wanda_lightning import KeepZeros, LearnMasks, RigL, WandaPrune, prune
from wanda_lightning.core.rigl import drop_and_grow

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # they would only slow down these tests
    pytest.mark.filterwarnings("ignore:.*but have no `val_dataloader`"),  # some tests only train
]


class Looks(L.Callback):
    """Records the zeros after each optimizer step, and checks their number."""

    def __init__(self, pattern="unstructured"):
        self.pattern, self.zeros = pattern, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        assert share_of_zeros(pl_module) == all_at(0.5), trainer.global_step
        found = zeros(pl_module)
        if self.pattern == "2:4":
            assert all((where.view(-1, 4).sum(dim=1) == 2).all() for where in found.values())
        if len(self.zeros) < trainer.global_step:
            self.zeros.append(found)

    def moves(self):
        """The steps after which a layer had other zeros than before."""
        pairs = zip(self.zeros, self.zeros[1:], strict=False)
        return [step for step, (old, new) in enumerate(pairs, start=2) if not equal(old, new)]


def made(optimizer=ADAMW):
    torch.manual_seed(0)
    return Net(optimizer)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_zeros_move_at_the_steps_of_the_schedule(precision, accumulate, pattern):
    looks, module = Looks(pattern), made()
    options = {"accumulate_grad_batches": accumulate, "gradient_clip_val": 0.5, **precision_of(precision)}
    callbacks = WandaPrune(0.5, num_samples=24, pattern=pattern), RigL(every=4, until=0.7), looks
    trainer(*callbacks, max_steps=20, **options).fit(module, loader(24))
    assert looks.moves() == [4, 8, 12]
    assert not hooks_of(module, module.used_optimizer)


def test_it_moves_as_the_formula_says():
    module = made(partial(torch.optim.SGD, lr=0.1))
    looks = Looks()
    moving = RigL(every=2, share=0.4, until=1)
    trainer(WandaPrune(0.5, num_samples=24), moving, looks, max_steps=4).fit(module, loader(24))
    expected = made()
    prune(expected, [batch[0] for batch in loader(24)], 0.5, progress=False)
    weights = [weight for weight in expected.parameters() if weight.ndim == 2]
    for step, batch in enumerate(list(loader(24))[:4]):
        expected.zero_grad()
        expected._loss(batch).backward()
        with torch.no_grad():
            for weight in expected.parameters():
                keep = weight != 0
                if weight.ndim == 2:
                    if step == 1:  # the share has fallen to half of 0.4 in the middle, and falls to 0 at the end
                        keep = drop_and_grow(weight, weight.grad, keep, 0.2)
                        weight *= keep
                    weight.grad *= keep
                weight -= 0.1 * weight.grad
    for weight, other in zip(weights, (w for w in module.parameters() if w.ndim == 2), strict=True):
        assert torch.allclose(weight, other, atol=1e-6)


def test_dropped_weights_lose_their_moments_and_grown_ones_move():
    class Watches(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            for weight in pl_module.parameters():
                if weight.ndim == 2:
                    moments = trainer.optimizers[0].state[weight]
                    assert not moments["exp_avg"][weight == 0].any()
                    assert (moments["exp_avg_sq"][weight != 0] > 0).float().mean() > 0.5  # some units are dead

    trainer(WandaPrune(0.5, num_samples=24), RigL(every=2), Watches(), max_steps=12).fit(made(), loader(24))


@pytest.mark.parametrize("optimizer", [ADAMW, SGD])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, optimizer):
    def callbacks(*others):
        pruning = WandaPrune(num_samples=24, dataloader=list(loader(24)), at_step=1)
        return pruning, RigL(every=3), *others

    whole = made(optimizer)
    trainer(*callbacks(SaveAt(tmp_path, 1, 2, 3, 5)), max_steps=10).fit(whole, Resumable())
    for step in (1, 2, 3, 5):
        resumed = made(optimizer)
        trainer(*callbacks(), max_steps=10).fit(resumed, Resumable(), ckpt_path=tmp_path / f"{step}.ckpt")
        assert equal(state(resumed), state(whole)), step


def test_a_model_that_was_pruned_earlier():
    module, looks = made(), Looks("2:4")
    prune(module, [batch[0] for batch in loader(24)], 0.5, pattern="2:4", progress=False)
    with pytest.raises(MisconfigurationException, match=r"pattern of RigL must be given.*KeepZeros"):
        trainer(KeepZeros(), RigL(every=2), max_steps=8).fit(copy.deepcopy(module), loader(24))
    trainer(KeepZeros(), RigL(every=2, pattern="2:4"), looks, max_steps=8).fit(module, loader(24))
    assert looks.moves() == [2, 4]  # the share is 0 at step 6


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([RigL(every=4)], "RigL moves the zeros that PruningCallback or KeepZeros holds"),
        ([WandaPrune(num_samples=12), RigL(every=4)], "every of RigL must be at most 0.75 of the 4 steps"),
        ([WandaPrune(num_samples=12), RigL(every=1), LearnMasks()], "RigL and LearnMasks both move the zeros"),
    ],
)
def test_what_cannot_work_is_refused(callbacks, message):
    with pytest.raises(MisconfigurationException, match=message):
        trainer(*callbacks, max_steps=4).fit(made(), loader())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"every": 0}, "every must be at least 1"),
        ({"share": 0}, "share of RigL must be a number above 0 and at most 1"),
        ({"until": 1.5}, "until of RigL must be a number above 0 and at most 1"),
        ({"pattern": "5:4"}, "pattern N:M keeps N of every M"),
    ],
)
def test_values_out_of_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        RigL(**wrong)
