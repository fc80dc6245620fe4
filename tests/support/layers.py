"""Random layers, their statistics, and solvers and allocations applied to them."""

from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.testing import assert_close

from wanda_lightning.core.allocation import DenseLayer
from wanda_lightning.core.patterns import Unstructured
from wanda_lightning.core.selection import Selection
from wanda_lightning.core.statistics import GradientStatistics, InputStatistics

SHAPE = (16, 64)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
WIDE = (12, 300)  # more than two of SparseGPT's blocks of columns


def rng(seed=0):
    """A generator of random numbers."""
    return torch.Generator().manual_seed(seed)


@contextmanager
def seed(number):
    """Seed the random numbers of the CPU; afterward they go on as before."""
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would reseed the accelerators too.
        torch.default_generator.manual_seed(number)
        yield


def assert_same(first, second):
    """Tensors, nested states, or the states of two models are equal."""
    if isinstance(first, nn.Module):
        first = first.state_dict()
        second = second.state_dict()
    assert_close(first, second, rtol=0, atol=0)


def random_layer(dtype=torch.float32, seed=0, shape=SHAPE, tokens=40):
    """A weight and the tokens that enter it, some columns a hundred times larger than others."""
    generator = rng(seed)
    scale = 10 ** (2 * torch.rand(shape[1], generator=generator) - 1)
    weight = torch.randn(*shape, generator=generator)
    inputs = torch.randn(tokens, shape[1], generator=generator) * scale
    return weight.to(dtype), inputs.to(dtype)


small_layer = partial(random_layer, torch.float64, shape=(6, 32), tokens=200)


def wide_layer():
    return random_layer(shape=WIDE, tokens=500)


def correlated_layer(seed=1, width=32):
    """A layer with correlated inputs, where the kept weights can compensate for the pruned ones."""
    weight, tokens = small_layer(seed=seed, shape=(6, width))
    return weight, tokens @ torch.randn(width, width, generator=rng(seed)).double() / 10


def statistics(tokens, *methods):
    """The statistics of the tokens that criteria or solvers need."""
    inputs = InputStatistics(frozenset().union(*(method.needs for method in methods)))
    inputs.update(tokens)
    return inputs


def solve(solver, weight, tokens, criterion=None, pattern=Unstructured(), sparsity=0.5):
    """The weight and mask that a solver returns for a layer, by default with its own criterion."""
    criterion = criterion or solver.own_criterion
    inputs = statistics(tokens, criterion, solver)
    return solver(weight, inputs, Selection(criterion, pattern, sparsity))


def output_error(weight, pruned, tokens):
    """The squared error of a layer's outputs."""
    return (tokens.double() @ (pruned - weight).double().t()).square().sum().item()


def dense_layer(name, block, weight, tokens=None, pattern=Unstructured()):
    """A layer as an allocation sees it, with gradients that are 1 everywhere; without statistics if without tokens."""
    inputs = InputStatistics(())
    gradients = None
    if tokens is not None:
        inputs = InputStatistics({"square_sum"})
        inputs.update(tokens)
        gradients = GradientStatistics(
            tokens.square().sum(dim=0), torch.full((len(weight),), float(len(tokens)))
        )
    return DenseLayer(
        name,
        block,
        weight.numel(),
        pattern.sparsity_steps(*weight.shape),
        lambda: weight,
        inputs,
        gradients,
    )


class NamedLayer(NamedTuple):
    """A layer with the tokens that enter it."""

    name: str
    block: str
    weight: torch.Tensor
    tokens: torch.Tensor


def random_layers(seed=0, shapes=((6, 24), (24, 6)), blocks=4):
    """Layers whose weights differ in their tails from block to block."""
    generator = rng(seed)
    layers = []
    for block in range(blocks):
        for index, shape in enumerate(shapes):
            weight = torch.randn(shape, generator=generator)
            tokens = torch.randn(5 + index, shape[1], generator=generator)
            weight = weight * weight.abs() ** (block + 0.3 * index)
            layers.append(NamedLayer(f"{block}.{index}", str(block), weight, tokens))
    return layers


def allocate(allocation, layers, sparsity, pattern=Unstructured()):
    return allocation([dense_layer(*layer, pattern) for layer in layers], sparsity)


def mean_of(sparsities, layers):
    size = sum(layer.weight.numel() for layer in layers)
    return sum(sparsities[layer.name] * layer.weight.numel() for layer in layers) / size
