"""Models pruned with a recovery, and without it."""

from copy import deepcopy

import torch
from support.layers import rng
from support.quiet import prune
from torch import nn
from torch.testing import assert_close


class IntoItsDtype(nn.Linear):
    """Writes its output into a tensor in the dtype of its weights, which fails in mixed precision."""

    def forward(self, x):
        y = torch.zeros(len(x), self.out_features, dtype=self.weight.dtype)
        rows = torch.arange(len(x))
        y[rows] = super().forward(x)
        return y


def pruned_with_and_without(dense, batches, sparsity=0.5, recovery=None, **choices):
    """The model that is pruned without the recovery, the one with it, and its report."""
    start = deepcopy(dense)
    model = deepcopy(dense)
    prune(start, batches, sparsity, **choices)
    report = prune(model, batches, sparsity, recovery=recovery, **choices)
    return start, model, report


def assert_close_states(model, other, **tolerances):
    assert_close(model.state_dict(), other.state_dict(), **tolerances)


def weights_of(report):
    """The names of the parameters that were pruned."""
    return {f"{layer.name}.weight" for layer in report.layers}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8))

    def forward(self, x):
        return x + self.mlp(x)


def blocks(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block()).to(dtype)


def some_batches(count, dtype=torch.float64, size=16):
    generator = rng(1)
    return [torch.randn(size, 8, generator=generator).to(dtype) for _ in range(count)]
