"""A small module and its training, shared by the tests of the callbacks."""

import os
import signal
from copy import deepcopy
from functools import cache, partial

import lightning as L
import pytest
import torch
from lightning.pytorch.trainer.connectors import callback_connector
from support import forks
from support.chains import hooks, overrides
from support.layers import rng
from support.quiet import prune
from support.zoo import model_of, run
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import _global_optimizer_post_hooks
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

from wanda_lightning import WandaPrune
from wanda_lightning.callbacks import Schedule

# Starts of Lightning's advice that does not fit: workers would only slow down these tests, and some only train, for a
# few steps.
ADVICE = (
    "does not have many workers",
    "but have no `val_dataloader`",
    "The number of training batches",
)
WITHOUT_ADVICE = pytest.mark.filterwarnings(*(f"ignore:.*{message}" for message in ADVICE))

LAYERS = ["layers.0", "layers.2", "layers.4"]  # of Net
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1)
ADAMW = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.5)


class Net(L.LightningModule):
    """A user's own module, without any code for pruning."""

    def __init__(self, optimizer=SGD):
        super().__init__()
        self.layers = model_of("plain_mlp").train()
        self.optimizer = optimizer

    def forward(self, x):
        return self.layers(x)

    def _loss(self, batch):
        x, labels = batch
        return F.cross_entropy(self(x).float(), labels)

    def training_step(self, batch, batch_idx):
        return self._loss(batch)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("loss", self._loss(batch))

    def test_step(self, batch, batch_idx):
        self.log("loss", self._loss(batch))

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        self.used_optimizer = self.optimizer(self.parameters())
        return self.used_optimizer


class OfZoo(L.LightningModule):
    """A model of the zoo, on its own batches."""

    def __init__(self, name):
        super().__init__()
        self.pruning_target = model_of(name).train()

    def forward(self, *args, **kwargs):
        return self.pruning_target(*args, **kwargs)

    def training_step(self, batch, batch_idx):
        return run(self.pruning_target, batch).square().mean()

    def validation_step(self, batch, batch_idx):
        run(self.pruning_target, batch)

    def test_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def samples(count=12):
    random = rng()
    return TensorDataset(
        torch.randn(count, 32, generator=random), torch.randint(16, (count,), generator=random)
    )


def loader(count=12, batch_size=4, **kwargs):
    return DataLoader(samples(count), batch_size, **kwargs)


# By all samples of `loader()`.
wanda = partial(WandaPrune, num_samples=12)

# Each Trainer would read the entry points of all installed packages anew.
callback_connector._load_external_callbacks = cache(callback_connector._load_external_callbacks)


def trainer(*callbacks, **kwargs):
    options = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        **kwargs,
    }
    return L.Trainer(callbacks=list(callbacks), **options)


def run_loop(loop, module, *callbacks, count=12, data=None, ckpt_path=None, **options):
    """Run `fit`, `validate`, `test` or `predict`, and return what the Trainer returns."""
    run = getattr(trainer(*callbacks, **options), loop)
    return run(module, loader(count) if data is None else data, ckpt_path=ckpt_path)


fit_module = partial(run_loop, "fit")
validate_module = partial(run_loop, "validate")


def zeros(module):
    return zeros_in(dict(module.named_parameters()))


def zeros_in(weights):
    """Where the matrices of a state are zero."""
    return {name: weight == 0 for name, weight in weights.items() if weight.ndim == 2}


def share_of_zeros(module):
    return {name: round(where.float().mean().item(), 3) for name, where in zeros(module).items()}


def all_at(share):
    return dict.fromkeys([f"{name}.weight" for name in LAYERS], share)


def same(a, b):
    """Whether two modules have the same parameters and buffers, to the last bit."""
    first = a.state_dict()
    second = b.state_dict()
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


def train_by_hand(module, batches, optimizer, accumulate, clip):
    """Train a pruned model in a loop that masks gradients and weights at each step."""
    keep = {weight: weight != 0 for weight in module.parameters() if weight.ndim == 2}
    for number, batch in enumerate(batches, start=1):
        (module._loss(batch) / accumulate).backward()
        if number % accumulate:
            continue
        for weight, kept in keep.items():
            weight.grad *= kept
        if clip:
            nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()
        with torch.no_grad():
            for weight, kept in keep.items():
                weight *= kept
        optimizer.zero_grad()


@torch.no_grad()
def to_quarters(module):
    """Weights that steps of a quarter can make exactly zero: -0.25 and 0.25, and a few zeros."""
    for weight in module.parameters():
        weight.copy_(torch.where(weight < 0, -0.25, 0.25))


def hooks_of(module, optimizer):
    on_weights = [
        name for name, weight in module.named_parameters() if weight._post_accumulate_grad_hooks
    ]
    on_steps = [*optimizer._optimizer_step_post_hooks, *_global_optimizer_post_hooks]
    return on_weights + hooks(module) + overrides(module) + on_steps


class Notes(L.Callback):
    """Records all weights when a batch ends, by the number of optimizer steps."""

    def __init__(self):
        self.at = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step not in self.at:  # accumulating
            self.at[trainer.global_step] = deepcopy(pl_module.state_dict())


class Manual(Net):
    """Steps by hand, after every second batch."""

    def __init__(self):
        super().__init__()
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


def pruned_by_hand(weights, sparsity, count=24, **options):
    module = Net()
    module.load_state_dict(weights)
    prune(module, list(loader(count)), sparsity, **options)
    return module


class Steps(Schedule):
    """A user's own schedule."""

    stages = ()

    def __init__(self, *stages):
        self.stages = stages


class SaveAt(L.Callback):
    """Saves a checkpoint after each of these optimizer steps, as `<step>.ckpt`."""

    def __init__(self, folder, *steps):
        self.folder = folder
        self.steps = steps

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        path = self.folder / f"{trainer.global_step}.ckpt"
        if trainer.global_step in self.steps and not path.exists():
            trainer.save_checkpoint(path)


class Recorder(Net):
    """Records the batches that it is calibrated on, and those that it is trained or validated on."""

    def __init__(self):
        super().__init__()
        self.seen = []
        self.trained = []

    def calibration_step(self, batch):
        self.seen.append(batch)
        return self(batch[0])

    def training_step(self, batch, batch_idx):
        self.trained.append(batch)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.trained.append(batch)


class Reader(L.Callback):
    """Records the first tensor of each batch of training."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(tree_leaves(batch)[0].tolist())


def batches_of_each_step(module, data, *callbacks, **options):
    """Fit for two epochs, or go on from a checkpoint; return the batches."""
    reader = Reader()
    options |= {"max_epochs": 2, "limit_val_batches": 0}
    fit_module(module, reader, *callbacks, data=data, **options)
    return reader.seen


def tagged(tag):
    """One batch of four samples, which hold this number."""
    inputs = torch.full((4, 32), float(tag))
    return DataLoader(TensorDataset(inputs, torch.zeros(4, dtype=torch.long)), 4)


class Resumable:
    """A stateful loader: a run resumed within an epoch continues with the next batch."""

    def __init__(self, count=24):
        self.batches = list(loader(count))
        self.done = 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        self.done %= len(self)
        while self.done < len(self):
            self.done += 1
            yield self.batches[self.done - 1]

    def state_dict(self):
        return {"done": self.done}

    def load_state_dict(self, state):
        self.done = state["done"]


def state(module):
    return {"weights": module.state_dict(), "optimizer": module.used_optimizer.state_dict()}


class PrintedSteps(L.Callback):
    """Prints when a step begins, and may kill the process at one."""

    def __init__(self, last=None):
        self.last = last

    def on_train_batch_start(self, trainer, *_):
        print(f"step {trainer.global_step}")
        if trainer.global_step == self.last:
            os.kill(os.getpid(), signal.SIGKILL)


def killed_and_resumed(folder, attempt):
    """Run an attempt as a whole, and another one that is killed and resumed, each in processes of its own.

    Return the first step of the resumed run, which it prints, and the results of both.
    """
    finished = forks.run(attempt, folder / "whole", False)
    killed = forks.run(attempt, folder / "killed", True)
    resumed = forks.run(attempt, folder / "killed", False)
    assert (finished.returncode, killed.returncode, resumed.returncode) == (0, -signal.SIGKILL, 0)
    first_steps = [run.stdout.splitlines()[0] for run in (finished, killed, resumed)]
    assert first_steps[:2] == ["step 0", "step 0"]
    results = [
        torch.load(folder / name / "final.pt", weights_only=True) for name in ("whole", "killed")
    ]
    return first_steps[2], *results
