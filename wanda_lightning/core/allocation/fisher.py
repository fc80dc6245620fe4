"""Fisher: less sparsity where the gradients of the dense model say that the weights matter more."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from wanda_lightning.common.checks import COUNT, Number, check
from wanda_lightning.common.float64 import widened
from wanda_lightning.core.allocation.allocation import (
    Allocation,
    DenseLayer,
    GradientLimit,
    Layers,
    Sparsities,
    UnitLayer,
    UnitLayers,
    match_target,
    mean_of,
)
from wanda_lightning.core.patterns import Structured

_MOST_OF_KEPT = 0.375  # largest deviation, as a fraction of what is kept
_MOST_UNITS = 0.6  # of a layer
_BINS = 1 << 14  # of a histogram of scores
# The first and the last bin, as natural logarithms of a score; zeros are in the first one.
_LOWEST = -100.0
_HIGHEST = 100.0
_HALVINGS = 50


@dataclass(frozen=True)
class Fisher(Allocation):
    """Less sparsity where the weights matter more for the predictions, with the weights of all layers compared.

    The score of the weight from input i to output j is `W_ji² * f_i * r_j`. Here `f_i` is the sum over tokens of
    `x_i² * mean(g²)`, with the input x and the gradient g of the log-likelihood of the model's own predictions at the
    layer's outputs, and `r_j` is the sum of `g_j²` relative to its mean over the outputs. The score estimates the
    increase of the loss if the weight becomes zero, to second order and with the diagonal of the Fisher information as
    curvature (LeCun et al. 1989). One threshold for the whole model gives each layer the fraction of its weights that
    are below, at most `max_deviation` from the target. The cost is one forward and backward pass of the dense model; no
    labels are needed.

    The score of a hidden unit is the sum over tokens of its squared activation times the squared gradient there. The
    units with the smallest scores of the whole model become zero, but in each layer at most 60 %, or halfway from the
    target to 100 % if that is more. With a `cost`, scores are divided by the cost of a unit, and `sparsity` is the
    fraction of the total cost that is removed (compare Shen et al. 2022, arXiv 2110.10811).

    Attributes:
        max_deviation: Maximum difference between a layer's sparsity and the target, and at most 3/8 of the fraction
            that is kept: 0.15 up to 60 %, and 0.1125 at 70 %, where a language model lost its quality with 0.15.
        num_samples: Number of calibration samples, the first ones of all processes together, that are passed backward;
            None for all.
        num_predictions: Take more samples, if there are any, until they have this many predictions: a window of text
            has one for each token, an image a single one.
        cost: What a hidden unit costs: the same for all (`"units"`), or its part of the measured time that its block
            takes for a calibration batch (`"seconds"`), which may give other masks on another machine, or in a second
            run.
    """

    reads_gradients = True
    max_deviation: float = 0.15
    num_samples: int | None = None
    num_predictions: int = 0
    cost: Literal["units", "seconds"] = "units"

    def __post_init__(self) -> None:
        check(
            self,
            max_deviation=Number(minimum=0, maximum=1),
            num_predictions=Number(minimum=0, whole=True),
            cost=("units", "seconds"),
        )
        if self.num_samples is not None:
            check(self, num_samples=COUNT)

    @property
    def gradient_limit(self) -> GradientLimit:
        """`num_samples` and `num_predictions`."""
        return GradientLimit(self.num_samples, self.num_predictions)

    def scaled(self, fraction: float) -> Fisher:
        """Scale the differences between layers."""
        return replace(self, max_deviation=self.max_deviation * fraction)

    def limits(self, sparsity: float) -> tuple[float, float]:
        """Return the target minus and plus the deviation; they do not apply to hidden units."""
        deviation = min(self.max_deviation, _MOST_OF_KEPT * (1 - sparsity))
        return sparsity - deviation, sparsity + deviation

    def __call__(self, layers: Layers, sparsity: float) -> Sparsities:
        """Compare the weights of all layers."""
        distributions = {layer.name: _distribution(layer) for layer in layers}
        lowest, highest = self.limits(sparsity)
        wanted = {}

        # Bisect for the threshold of the whole model.
        low = 0.0
        high = float(_BINS)
        for _ in range(_HALVINGS):
            threshold = (low + high) / 2
            for name, distribution in distributions.items():
                fraction = _fraction_below(distribution, threshold)
                wanted[name] = min(max(fraction, lowest), highest)
            if mean_of(layers, wanted) < sparsity:
                low = threshold
            else:
                high = threshold
        return match_target(layers, wanted, sparsity)

    def of_units(self, layers: UnitLayers, sparsity: float, pattern: Structured) -> Sparsities:
        """Compare the units of all layers; `max_deviation` does not apply."""
        # Ranks have no ties, while many units may have the score 0.
        scores = torch.cat([_unit_scores(layer) for layer in layers])
        ranks = scores.argsort(stable=True).argsort()
        ranks_by_layer = ranks.split([layer.width for layer in layers])
        largest_fraction = max(_MOST_UNITS, (1 + sparsity) / 2)

        def removed(rank: int) -> list[int]:
            """Return how many units of each layer become zero if the threshold is `rank`, as the pattern rounds it."""
            numbers = []
            for layer, layer_ranks in zip(layers, ranks_by_layer, strict=True):
                lower = int((layer_ranks < rank).count_nonzero())
                fraction = min(lower / layer.width, largest_fraction)
                numbers.append(layer.width - pattern.kept(layer.width, fraction))
            return numbers

        def cost_of(numbers: Iterable[int]) -> float:
            return sum(layer.cost * number for layer, number in zip(layers, numbers, strict=True))

        # Costs are relative to their mean, so their total is the number of units; `round` removes rounding errors.
        total_cost = round(cost_of(layer.width for layer in layers), 6)
        cost_to_remove: float = int(sparsity * total_cost)
        rank = bisect_left(
            range(len(ranks)), cost_to_remove, key=lambda rank: cost_of(removed(rank))
        )
        return {
            layer.name: number / layer.width
            for layer, number in zip(layers, removed(rank), strict=True)
        }


def _unit_scores(layer: UnitLayer) -> Tensor:
    assert layer.scores is not None, "Fisher reads gradients"
    return layer.scores.cpu() / layer.cost


def _distribution(layer: DenseLayer) -> Tensor:
    """Return the fraction of the layer's scores that are below the end of each bin."""
    assert layer.gradients, "Fisher reads gradients"
    weight = layer.read()
    scores = widened(weight.abs()).log_().mul_(2)
    scores += layer.gradients.inputs.to(scores.dtype).log()
    scores += layer.gradients.row_weights().to(scores.dtype).log()[:, None]

    bins_per_unit = (_BINS - 1) / (_HIGHEST - _LOWEST)
    bins = scores.clamp_(_LOWEST, _HIGHEST).sub_(_LOWEST).mul_(bins_per_unit).to(torch.int32)
    counts = bins.flatten().bincount(minlength=_BINS).cpu().double()
    return counts.cumsum(0).div_(layer.size)


def _fraction_below(distribution: Tensor, threshold: float) -> float:
    """Interpolate linearly within the bin of the threshold, which is counted in bins."""
    whole = min(int(threshold), _BINS - 1)
    start = float(distribution[whole - 1]) if whole else 0.0
    end = float(distribution[whole])
    return start + (threshold - whole) * (end - start)
