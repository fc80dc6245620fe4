"""Small chains of blocks, and ways to run them in lockstep."""

from contextlib import closing

import torch
import torch.nn.functional as F
from support.layers import rng
from support.samples import samples_of
from torch import nn

from wanda_lightning.calibration.lockstep import lockstep
from wanda_lightning.models import Stop

WIDTH = 8


class Mlp(nn.Module):
    """A block; `before` runs inside it, before its layers."""

    def __init__(self, before=None):
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.before = before

    def forward(self, x):
        if self.before is not None:
            self.before()
        return x + self.down(F.relu(self.up(x)))


class Chain(nn.Module):
    """Blocks one after another, with the model's own code, `glue(index)`, before each and after the last."""

    def __init__(self, *blocks, glue=lambda index: None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(WIDTH, 4)
        self.glue = glue

    def forward(self, x):
        for index, block in enumerate(self.blocks):
            self.glue(index)
            x = block(x)
        self.glue(len(self.blocks))
        return self.head(x)


class EitherWay(Chain):
    """The blocks in their order or in the reverse one, by the sign of the input's mean."""

    def forward(self, x):
        for block in self.blocks if x.mean() > 0 else reversed(self.blocks):
            x = block(x)
        return self.head(x)


class Looped(nn.Module):
    """Two blocks, applied several times."""

    def __init__(self, times):
        super().__init__()
        self.blocks = nn.ModuleList([Mlp(), Mlp()])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 4)
        self.times = times

    def forward(self, x):
        for _ in range(self.times):
            for block in self.blocks:
                x = block(x)
            x = self.norm(x)
        return self.head(x)


def vectors(count=3):
    """Batches of two and three samples in turn."""
    generator = rng()
    return [torch.randn(2 + index % 2, 3, WIDTH, generator=generator) for index in range(count)]


@torch.no_grad()
def through(blocks, x):
    """A plain forward through some blocks."""
    for block in blocks:
        x = block(x)
    return x


def travel(model, batches, modules, **options):
    """The index of each module at which all batches stop, and their calls."""
    stops = [Stop(str(index), module, ()) for index, module in enumerate(modules)]
    with closing(lockstep(stops, samples_of(model, batches), **options)) as visits:
        for stop, calls in visits:
            yield int(stop.name), calls


def route(model, batches, modules):
    """The index of each module at which batches stop, and these batches."""
    return [
        (index, [call.sample.batch_index for call in calls])
        for index, calls in travel(model, batches, modules)
    ]


def overrides(model):
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


def hooks(model):
    return [
        name
        for name, module in model.named_modules()
        if module._forward_pre_hooks or module._forward_hooks
    ]
