"""Random layers and their statistics."""

import torch

from wanda_lightning.core.statistics import InputStatistics

SHAPE = (16, 64)


def random_layer(dtype=torch.float32, seed=0, shape=SHAPE, tokens=40):
    """A weight and the tokens that enter it, some columns a hundred times larger than others."""
    generator = torch.Generator().manual_seed(seed)
    scale = 10 ** (2 * torch.rand(shape[1], generator=generator) - 1)
    weight = torch.randn(*shape, generator=generator)
    return weight.to(dtype), (torch.randn(tokens, shape[1], generator=generator) * scale).to(dtype)


def statistics(tokens, *parts):
    inputs = InputStatistics(frozenset().union(*(part.needs for part in parts)))
    inputs.update(tokens)
    return inputs
