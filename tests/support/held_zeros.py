"""Models and callbacks that check the zeros after every optimizer step."""

from copy import deepcopy
from functools import partial

import lightning as L
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.plugins.precision import MixedPrecision
from support.callbacks import SGD, Net, zeros
from timm.optim import Lion


class Noisy(Lion):
    """Adds noise to every weight at every step (Langevin dynamics), whatever its gradient."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        for weight in (weight for group in self.param_groups for weight in group["params"]):
            weight.add_(torch.randn_like(weight), alpha=0.01)
        return loss


OPTIMIZERS = {
    "momentum": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.1),
    "adamw_foreach": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.5, foreach=True),
    "adamw_fused": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.5, fused=True),
    "amsgrad": partial(torch.optim.Adam, lr=0.01, weight_decay=0.1, amsgrad=True),
    "rmsprop": partial(
        torch.optim.RMSprop, lr=0.005, momentum=0.9, centered=True, weight_decay=0.1
    ),
    "adadelta": partial(torch.optim.Adadelta, lr=1.0, weight_decay=0.1),
    "lion": partial(Lion, lr=0.01, weight_decay=0.1),
    "noisy": partial(Noisy, lr=0.01, weight_decay=0.1),
}
PRECISIONS = ["32-true", "bf16-mixed", "16-mixed", "bf16-true"]


def precision_of(name, init_scale=1024.0):
    if name != "16-mixed":
        return {"precision": name}
    # On a CPU, Lightning replaces 16-mixed by bf16-mixed, but its plugin and torch can do it.
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=100)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


def of_the_shape(weight, state):
    tensors = [value for value in state.values() if isinstance(value, torch.Tensor)]
    return [
        tensor for tensor in tensors if tensor.is_floating_point() and tensor.shape == weight.shape
    ]


class LooksAtZeros(Net):
    """Checks its zeros, and those of its optimizers' states, right after each optimizer step, and before each batch.

    The weights that are zero at the first batch after `from_step` steps are the pruned ones, and must stay zero.
    """

    def __init__(self, optimizer=SGD, from_step=0):
        super().__init__(optimizer)
        self.from_step = from_step
        self.pruned = None
        self.looks = 0  # how often the zeros were checked
        self.first_weights = {}

    def look(self):
        if self.pruned is None:
            return
        self.looks += 1
        for name, where in zeros(self).items():
            revived = (self.pruned[name] & ~where).sum().item()
            died = (where & ~self.pruned[name]).sum().item()
            # In a dtype of few bits, a weight and its step may cancel.
            by_chance = 0.005 * where.numel() if self.dtype == torch.bfloat16 else 0
            assert (revived, max(died - by_chance, 0)) == (0, 0), (
                f"{name} after {self.trainer.global_step} steps"
            )

    def look_at_state(self):
        for name, where in (self.pruned or {}).items():
            for optimizer in self.trainer.optimizers:
                for value in of_the_shape(where, optimizer.state[self.get_parameter(name)]):
                    assert not value[where].any(), f"{name} after {self.trainer.global_step} steps"

    def training_step(self, batch, batch_idx):
        if self.pruned is None and self.trainer.global_step >= self.from_step:
            self.pruned = zeros(self)
            self.first_weights = deepcopy(self.state_dict())
        self.look()
        self.look_at_state()
        return super().training_step(batch, batch_idx)

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        self.look()
        self.look_at_state()

    def trained(self):
        """The fraction of the kept weights of each layer that have changed."""
        fractions = {}
        for name, where in self.pruned.items():
            has_moved = self.get_parameter(name) != self.first_weights[name]
            fractions[name] = has_moved[~where].float().mean().item()
        return fractions


class Witness(L.Callback):
    """Checks the zeros in the hooks of another callback."""

    def on_before_zero_grad(self, trainer, pl_module, *_):
        pl_module.look()

    on_train_batch_end = on_before_zero_grad


AVERAGING = {
    "ema": lambda: EMAWeightAveraging(decay=0.8),
    "ema of late start": lambda: EMAWeightAveraging(
        decay=0.8, update_starting_at_step=7, update_every_n_steps=2
    ),
    "mean": WeightAveraging,
    "swa": lambda: StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1),
}
