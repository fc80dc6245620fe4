"""Small models: residual MLPs whose hidden units are apart from each other, linear layers, one layer alone."""

from functools import partial
from itertools import pairwise

from torch import nn
from torch.nn import functional as F

MIXING = {
    "LayerNorm": nn.LayerNorm,
    "GroupNorm": partial(nn.GroupNorm, 4),
    "Softmax": lambda width: nn.Softmax(-1),
}
"""Layers, by their width, whose outputs depend on all inputs."""


def relu_mlp(*widths):
    """Linear layers of some widths, with a ReLU between any two."""
    layers = []
    for d_in, d_out in pairwise(widths):
        layers += [nn.Linear(d_in, d_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Mlp(nn.Module):
    """A residual MLP with something between its layers, and a small branch."""

    def __init__(self, between=None, scale=1.0, width=64, size=32):
        super().__init__()
        self.up = nn.Linear(size, width)
        self.down = nn.Linear(width, size)
        self.between = between or nn.Identity()
        self.scale = scale

    def forward(self, x):
        return x + self.scale * self.down(self.between(F.gelu(self.up(x))))


class Holding(nn.Module):
    """One layer, behind an unused convolution of its kind that takes the place of the stem."""

    def __init__(self, part):
        super().__init__()
        self.stem = nn.Conv1d(1, 1, 1) if isinstance(part, nn.Conv1d) else nn.Conv2d(1, 1, 1)
        self.part = part

    def forward(self, x, attention_mask=None):
        return self.part(x)
