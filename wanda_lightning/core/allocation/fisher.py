"""Sparsity from what the model's predictions depend on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from wanda_lightning.core.allocation.base import Allocation, DenseLayer
from wanda_lightning.core.allocation.groups import refuse_one_group
from wanda_lightning.core.allocation.match_target import match_target, mean_of


@dataclass(frozen=True)
class Fisher(Allocation):
    """Less sparsity where weights matter more for the predictions, weights of all layers compared.

    The score of a weight is `W² * sum of x² * mean(g²)` over the tokens, x its input and g the gradient of the
    model's own predictions by the outputs of the layer: what the loss rises by when the weight goes, to second order,
    with the diagonal of the Fisher information for the curvature (LeCun et al. 1989). Under one threshold for the
    whole model, each layer gets the share of its weights that lie below, at most `max_deviation` from the target. Costs a
    forward and a backward pass of the dense model; no labels.

    Attributes:
        max_deviation: How far from the target a layer's sparsity may be.
        num_samples: Number of calibration samples, the first ones of all processes together, that are passed backward;
            None for all.
    """

    reads_gradients: ClassVar[bool] = True
    max_deviation: float = 0.15
    num_samples: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.max_deviation <= 1 or (self.num_samples is not None and self.num_samples < 1):
            raise ValueError(f"Fisher needs max_deviation in [0, 1] and num_samples of at least 1, but got {self}")

    @property
    def gradient_samples(self) -> int | None:
        """`num_samples`."""
        return self.num_samples

    def check(self, layers: Sequence[DenseLayer], sparsity: float) -> None:
        """Refuse a model with one layer."""
        refuse_one_group(self, layers, "layer")

    def scaled(self, share: float) -> Fisher:
        """Layers differ by the same share of what they do in the end."""
        return replace(self, max_deviation=self.max_deviation * share)

    def __call__(self, layers: Sequence[DenseLayer], sparsity: float) -> dict[str, float]:
        """Compare the weights of all layers."""
        below = {layer.name: _distribution(layer) for layer in layers}
        low, high = 0.0, float(_BINS)
        wanted: Mapping[str, float] = {}
        for _ in range(_HALVINGS):
            threshold = (low + high) / 2
            wanted = {
                name: min(max(_share(shares, threshold), sparsity - self.max_deviation), sparsity + self.max_deviation)
                for name, shares in below.items()
            }
            low, high = (threshold, high) if mean_of(layers, wanted) < sparsity else (low, threshold)
        return match_target(layers, wanted, sparsity)


_BINS, _LOWEST, _HIGHEST = 1 << 14, -100.0, 100.0  # of the natural logarithm of a score; zeros are in the first bin
_HALVINGS = 50


def _distribution(layer: DenseLayer) -> Tensor:
    """The share of the layer's weights that lie below the end of each bin."""
    assert layer.fisher is not None, "Fisher reads gradients"
    weight = layer.read()
    scores = weight.abs().to(torch.promote_types(weight.dtype, torch.float32)).log_().mul_(2)
    scores += layer.fisher.to(scores.dtype).log()
    bins = scores.clamp_(_LOWEST, _HIGHEST).sub_(_LOWEST).mul_((_BINS - 1) / (_HIGHEST - _LOWEST)).to(torch.int32)
    return bins.flatten().bincount(minlength=_BINS).cpu().double().cumsum(0).div_(layer.size)


def _share(shares: Tensor, threshold: float) -> float:
    """Linear within a bin."""
    whole = min(int(threshold), _BINS - 1)
    before = float(shares[whole - 1]) if whole else 0.0
    return before + (threshold - whole) * (float(shares[whole]) - before)
