"""Zeros stay zero: checked after every optimizer step, with everything that changes weights, and with KeepZeros."""

from functools import partial

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning, EMAWeightAveraging, WeightAveraging
from support.callbacks import (
    ADAMW,
    Net,
    Notes,
    all_at,
    fit_module,
    hooks_of,
    loader,
    same,
    share_of_zeros,
    to_quarters,
    train_by_hand,
    trainer,
    wanda,
    zeros,
    zeros_in,
)
from support.held_zeros import (
    AVERAGING,
    OPTIMIZERS,
    PRECISIONS,
    LooksAtZeros,
    Witness,
    of_the_shape,
    precision_of,
)
from support.layers import assert_same
from support.pairwise import pairwise, with_nightly
from support.quiet import prune
from timm.optim import Lion
from torch import nn
from torch.utils.checkpoint import checkpoint

from wanda_lightning import KeepZeros, PruningCallback, WandaPrune

CLIPPING = {
    None: {},
    "value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "norm": {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "norm"},
}


def is_accepted(optimizer, precision, accumulate, clip, at_step):
    # Lightning refuses the others: the gradients are unscaled inside the step.
    return not (optimizer == "adamw_fused" and "mixed" in precision and clip)


def prune_at(at_step, module, **options):
    """A callback that prunes at a step, or for None `KeepZeros` for a module that is pruned already."""
    if at_step is not None:
        return WandaPrune(0.5, at_step=at_step, **options)
    prune(module, criterion="magnitude")
    return KeepZeros()


AXES = PRECISIONS, [1, 3], CLIPPING, [0, 4, None]
# The states and updates of the others are like these.
FEW = ("momentum", "adamw_fused", "amsgrad", "noisy")


@pytest.mark.parametrize(
    ("optimizer", "precision", "accumulate", "clip", "at_step"),
    with_nightly(
        pairwise(FEW, *AXES, allowed=is_accepted), pairwise(OPTIMIZERS, *AXES, allowed=is_accepted)
    ),
)
def test_exactly_the_pruned_weights_are_zero_after_every_step(
    optimizer, precision, accumulate, clip, at_step
):
    module = LooksAtZeros(OPTIMIZERS[optimizer], from_step=at_step or 0)
    callback = prune_at(at_step, module, num_samples=24)
    fit_module(
        module,
        Witness(),
        callback,
        count=24,
        accumulate_grad_batches=accumulate,
        max_steps=8,
        **CLIPPING[clip],
        **precision_of(precision),
    )
    assert hooks_of(module, module.used_optimizer) == []
    assert {round(where.float().mean().item(), 3) for where in module.pruned.values()} == {0.5}
    assert module.looks >= 4 * (8 - module.from_step)
    # Units that are dead have no gradient.
    assert all(share > 0.5 for share in module.trained().values())
    for weight in module.parameters():
        if weight.ndim == 2 and optimizer != "adamw_fused":
            assert of_the_shape(weight, module.used_optimizer.state[weight])


class LooksBetweenSteps(LooksAtZeros):
    """LBFGS calls the model several times within a step, to try weights out."""

    stepping = False

    def look(self):
        if not self.stepping:
            super().look()

    def optimizer_step(self, *args, **kwargs):
        self.stepping = True
        L.LightningModule.optimizer_step(self, *args, **kwargs)
        self.stepping = False
        self.look()


class Checkpointed(LooksAtZeros):
    def forward(self, x):
        x = checkpoint(self.layers[:2], x, use_reentrant=False)
        return checkpoint(self.layers[2:], x, use_reentrant=True)


class Unfreezing(BaseFinetuning):
    """Trains the first layer from the second epoch on."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.layers[0])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.layers[0], optimizer, lr=0.05)


class FirstFrozen(LooksAtZeros):
    def configure_callbacks(self):
        return [Unfreezing()]

    def configure_optimizers(self):
        return self.optimizer([*self.layers[2:].parameters()])


@pytest.mark.filterwarnings(
    "ignore:None of the inputs have requires_grad"
)  # calibration needs no gradients
@pytest.mark.parametrize(
    ("make", "optimizer", "at_step", "options"),
    [
        (Checkpointed, OPTIMIZERS["momentum"], 5, {"accumulate_grad_batches": 2}),
        (LooksBetweenSteps, partial(torch.optim.LBFGS, lr=0.1, max_iter=3), 4, {}),
        (FirstFrozen, OPTIMIZERS["momentum"], 0, {}),
        # The scaler skips steps that overflow, and the next one is right.
        (
            LooksAtZeros,
            OPTIMIZERS["adamw_foreach"],
            2,
            {"max_steps": 40, **precision_of("16-mixed", 2.0**40)},
        ),
    ],
)
def test_other_ways_to_run_and_to_train_a_model(make, optimizer, at_step, options):
    module = make(optimizer, from_step=at_step)
    callback = WandaPrune(num_samples=24, at_step=at_step)
    options = {"max_steps": 8} | options
    fit_module(module, Witness(), callback, count=24, **options)
    assert share_of_zeros(module) == all_at(0.5)
    assert module.looks >= 2 * (8 - at_step)
    assert all(share > 0.5 for share in module.trained().values())


class Wrapping(LooksAtZeros):
    """Calls its model `module`, as wrappers of models do."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.module = self.layers
        del self.layers

    def forward(self, x):
        return self.module(x)


def averages(callback):
    model = callback._average_model
    if isinstance(callback, WeightAveraging):
        model = model.module
    return dict(model.named_parameters())


class AveragesHoldZeros(L.Callback):
    """The last callback: checks the averages after each batch, and the validated weights."""

    def __init__(self, averaging):
        self.averaging = averaging
        self.looks = 0
        self.validated = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        for name, where in (pl_module.pruned or {}).items():
            assert not averages(self.averaging)[name][where].any(), (
                f"{name} at step {trainer.global_step}"
            )
            self.looks += 1

    def on_validation_batch_start(self, trainer, pl_module, *_):
        if pl_module.pruned is not None:
            self.validated.append(zeros(pl_module))


@pytest.mark.parametrize(
    ("kind", "at_step", "order", "make"),
    pairwise(AVERAGING, [0, 5, None], [1, -1], [LooksAtZeros, Wrapping]),
)
def test_averages_hold_the_zeros(kind, at_step, order, make):
    module = make(OPTIMIZERS["adamw_foreach"], from_step=at_step or 0)
    averaging = AVERAGING[kind]()
    last = AveragesHoldZeros(averaging)
    callbacks = [averaging, prune_at(at_step, module, num_samples=12)][::order]
    trainer(*callbacks, last, max_epochs=4, num_sanity_val_steps=0).fit(module, loader(), loader())
    assert last.looks > 0
    assert last.validated
    for seen in (*last.validated, zeros(module)):
        assert_same(seen, module.pruned)
    assert_same(averages(averaging), dict(module.named_parameters()))


@pytest.mark.parametrize("kind", ["ema of late start", "swa"])
def test_averages_that_are_pruned_after_the_last_step(kind):
    module = Net(ADAMW)
    fit_module(module, AVERAGING[kind](), wanda(at_step=12), max_epochs=4)
    assert share_of_zeros(module) == all_at(0.5)


def test_a_checkpoint_beside_an_average_holds_the_zeros_in_both(tmp_path):
    fit = trainer(EMAWeightAveraging(decay=0.8), wanda(at_step=2), max_steps=2)
    fit.fit(LooksAtZeros(ADAMW, from_step=2), loader())
    fit.save_checkpoint(tmp_path / "both.ckpt")
    saved = torch.load(tmp_path / "both.ckpt", weights_only=True)
    for weights in (saved["state_dict"], saved["current_model_state"]):
        assert all((weights[name] == 0).float().mean() == 0.5 for name in all_at(0.5))


@pytest.mark.parametrize("callback", ["prune", "keep"])
def test_a_weight_that_becomes_zero_by_chance_keeps_training(callback):
    optimizer = partial(Lion, lr=0.25, betas=(0.0, 0.0))
    module = Net(optimizer)
    notes = Notes()
    by_hand = Net()
    to_quarters(by_hand)
    prune(by_hand, criterion="magnitude", pattern="unstructured")
    pruned = zeros(by_hand)
    if callback == "prune":
        to_quarters(module)
        keeping = PruningCallback(pattern="unstructured", method="magnitude")
    else:
        module.load_state_dict(by_hand.state_dict())
        keeping = KeepZeros()
    train_by_hand(by_hand, list(loader(24)) * 2, optimizer(by_hand.parameters()), 1, None)
    fit_module(module, keeping, notes, count=24, max_epochs=2)
    assert same(module, by_hand)
    middle = zeros_in(notes.at[6])
    for name, where in zeros(module).items():
        assert where[pruned[name]].all()
        assert (middle[name] & ~where).any()  # by chance


def test_keep_zeros_on_a_dense_model_warns():
    module = Net(ADAMW)
    alone = Net(ADAMW)
    with pytest.warns(
        UserWarning, match="No zeros were found in any prunable layer, so none are kept"
    ):
        fit_module(module, KeepZeros(), max_steps=2)
    fit_module(alone, max_steps=2)
    assert same(module, alone)


@pytest.mark.parametrize("callback", ["prune", "keep"])
def test_a_layer_of_all_zeros_trains(callback):
    module = Net(ADAMW)
    nn.init.zeros_(module.layers[4].weight)
    keeping = wanda()
    if callback == "keep":
        prune(module, criterion="magnitude", skip=["layers.4"])
        keeping = KeepZeros()
    fit_module(module, keeping, max_steps=6)
    shares = share_of_zeros(module)
    assert shares.pop("layers.4.weight") < 0.25  # dead units have no gradient
    assert set(shares.values()) == {0.5}


def test_neither_layers_nor_zeros_by_chance_of_one_model_affect_another():
    callback = KeepZeros()
    first = Net(partial(Lion, lr=0.25, betas=(0.0, 0.0)))
    second = LooksAtZeros(ADAMW)
    to_quarters(first)
    prune(first, criterion="magnitude", skip=["layers.4"])
    fit_module(first, callback, max_steps=1)
    assert share_of_zeros(first)["layers.0.weight"] > 0.5
    prune(second, criterion="magnitude")
    fit_module(second, callback, max_steps=4)
    assert share_of_zeros(second) == all_at(0.5)
