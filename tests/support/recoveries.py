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


class AdamByHand:
    """Adam on the kept weights, each tensor with the learning rate times the root of its mean square."""

    def __init__(self, parameters, learning_rate, decay):
        self.parameters = parameters
        self.keep = [(p != 0) | (p.ndim < 2) for p in parameters]
        kept = [p.detach()[mask] for p, mask in zip(parameters, self.keep, strict=True)]
        self.rates = [learning_rate * weights.square().mean().sqrt() for weights in kept]
        self.mean = [0.0] * len(parameters)
        self.square = [0.0] * len(parameters)
        self.decay = decay  # of the squares
        self.steps = 0

    def step(self, loss, factor=1.0):
        gradients = torch.autograd.grad(loss, self.parameters)
        self.steps += 1
        for index, parameter in enumerate(self.parameters):
            gradient = gradients[index] * self.keep[index]
            self.mean[index] = 0.9 * self.mean[index] + 0.1 * gradient
            self.square[index] = self.decay * self.square[index] + (1 - self.decay) * gradient**2
            up = self.mean[index] / (1 - 0.9**self.steps)
            down = (self.square[index] / (1 - self.decay**self.steps)).sqrt() + 1e-8
            parameter.data -= factor * self.rates[index] * up / down


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
