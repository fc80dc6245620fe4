"""Sparsity from measurements of the dense model: outliers among Wanda's scores (OWL), or gradients (Fisher)."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from wanda_lightning.common.checks import Number, check
from wanda_lightning.core.allocation.allocation import (
    Allocation,
    DenseLayer,
    GradientLimit,
    UnitLayer,
    match_target,
    mean_of,
)
from wanda_lightning.core.criteria import Wanda
from wanda_lightning.core.patterns import Structured
from wanda_lightning.core.types import Score


@dataclass(frozen=True)
class OWL(Allocation):
    """Less sparsity where more of Wanda's scores are outliers (Yin et al. 2024).

    A score of the dense model is an outlier if it exceeds `m` times the mean score of its block. The fractions of
    outliers of all blocks are mapped linearly to [0, 2 lambda]. A block with the value D gets
    `target - (D - mean of D)`.

    Attributes:
        m: Threshold of an outlier, as a multiple of the mean score.
        lambda_: Half of the maximum difference between the sparsities of two blocks.
        per: Whether all layers of a block get the same sparsity (the paper's choice), or each layer its own.
    """

    needs: ClassVar[frozenset[str]] = Wanda.needs
    m: float = 5.0
    lambda_: float = 0.08
    per: Literal["block", "layer"] = "block"

    def __post_init__(self) -> None:
        check(
            self, m=Number(above=0), lambda_=Number(minimum=0, maximum=0.5), per=("block", "layer")
        )

    def scaled(self, fraction: float) -> OWL:
        """Scale the differences between blocks."""
        return replace(self, lambda_=self.lambda_ * fraction)

    def __call__(self, layers: Sequence[DenseLayer], sparsity: float) -> dict[str, float]:
        """Compare the outliers of the blocks."""
        groups: dict[str, list[DenseLayer]] = {}
        for layer in layers:
            groups.setdefault(layer.block if self.per == "block" else layer.name, []).append(layer)
        outliers = {group: self._outliers(inside) for group, inside in groups.items()}
        low = min(outliers.values())
        high = max(outliers.values())
        wanted = {
            layer.name: -2 * self.lambda_ * ((outliers[group] - low) / ((high - low) or 1.0))
            for group, inside in groups.items()
            for layer in inside
        }
        return match_target(layers, wanted, sparsity)

    def _outliers(self, layers: Sequence[DenseLayer]) -> float:
        """The fraction of scores above `m` times their mean, over all these layers."""
        size = sum(layer.size for layer in layers)
        mean = math.fsum(float(_scores(layer).sum()) for layer in layers) / size
        return sum(int((_scores(layer) > self.m * mean).count_nonzero()) for layer in layers) / size


def _scores(layer: DenseLayer) -> Score:
    # Per token, since the layers of a block may have seen different numbers of tokens.
    return Wanda()(layer.read(), layer.inputs).div_(layer.inputs.count**0.5)


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
    units with the smallest scores of the whole model become zero: of a layer at most 60 %, or halfway from the target
    to all. With a `cost`, scores are divided by what a unit costs, and `sparsity` is the share of the cost of all
    hidden units that leaves (compare Shen et al. 2022, arXiv 2110.10811).

    Attributes:
        max_deviation: Maximum difference between a layer's sparsity and the target, and at most 3/8 of the fraction
            that is kept: 0.15 up to 60 %, and 0.1125 at 70 %, where a language model lost its quality with 0.15.
        num_samples: Number of calibration samples, the first ones of all processes together, that are passed backward;
            None for all.
        num_predictions: Take more samples, if there are any, until they have this many predictions: a window of text
            has one for each token, an image a single one.
        cost: What a hidden unit costs: all the same (`"units"`), its `"parameters"`, its multiply-adds (`"macs"`), or
            `"seconds"`: its share of the time that the forward pass of its block takes for a calibration batch, here
            and now. So `"seconds"` may give other masks on another machine, or in a second run.
    """

    reads_gradients: ClassVar[bool] = True
    fits_units: ClassVar[bool] = True
    max_deviation: float = 0.15
    num_samples: int | None = None
    num_predictions: int = 0
    cost: Literal["units", "parameters", "macs", "seconds"] = "units"

    def __post_init__(self) -> None:
        check(
            self,
            max_deviation=Number(minimum=0, maximum=1),
            num_predictions=Number(minimum=0, whole=True),
        )
        check(self, cost=("units", "parameters", "macs", "seconds"))
        if self.num_samples is not None:
            check(self, num_samples=Number(minimum=1, whole=True))

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

    def __call__(self, layers: Sequence[DenseLayer], sparsity: float) -> dict[str, float]:
        """Compare the weights of all layers."""
        distributions = {layer.name: _distribution(layer) for layer in layers}
        least, most = self.limits(sparsity)
        low = 0.0
        high = float(_BINS)
        wanted: Mapping[str, float] = {}
        for _ in range(_HALVINGS):
            threshold = (low + high) / 2
            wanted = {
                name: min(max(_fraction_below(distribution, threshold), least), most)
                for name, distribution in distributions.items()
            }
            low, high = (
                (threshold, high) if mean_of(layers, wanted) < sparsity else (low, threshold)
            )
        return match_target(layers, wanted, sparsity)

    def of_units(
        self, layers: Sequence[UnitLayer], sparsity: float, pattern: Structured
    ) -> dict[str, float]:
        """Compare the units of all layers; `max_deviation` does not apply."""
        most = max(_MOST_UNITS, (1 + sparsity) / 2)
        scored = [
            (layer, layer.scores.cpu() / layer.cost) for layer in layers if layer.scores is not None
        ]
        every = torch.cat([scores for _, scores in scored])
        ranks = every.argsort(
            stable=True
        ).argsort()  # without ties: many units may have the score 0
        widths = [layer.width for layer, _ in scored]
        own = [each.sort().values for each in ranks.split(widths)]

        def removed(rank: int) -> list[int]:
            """Return how many units of each layer become zero if those of lower ranks should."""
            below = (min(int(torch.searchsorted(each, rank)) / len(each), most) for each in own)
            return [
                width - pattern.kept(width, share)
                for width, share in zip(widths, below, strict=True)
            ]

        def enough(rank: int) -> bool:
            gone = sum(
                layer.cost * number
                for (layer, _), number in zip(scored, removed(rank), strict=True)
            )
            return gone >= int(
                sparsity * round(sum(layer.cost * layer.width for layer, _ in scored), 6)
            )

        found = removed(bisect_left(range(len(every)), True, key=enough))
        return {
            layer.name: number / layer.width
            for (layer, _), number in zip(scored, found, strict=True)
        }


_MOST_OF_KEPT = 0.375  # largest deviation, as a fraction of what is kept
_MOST_UNITS = 0.6  # of a layer
_BINS = 1 << 14
_LOWEST = -100.0
_HIGHEST = 100.0  # of the natural logarithm of a score; zeros are in the first bin
_HALVINGS = 50


def _distribution(layer: DenseLayer) -> Tensor:
    """The fraction of the layer's scores that are below the end of each bin."""
    assert layer.gradients is not None, "Fisher reads gradients"
    weight = layer.read()
    scores = weight.abs().to(torch.promote_types(weight.dtype, torch.float32)).log_().mul_(2)
    scores += layer.gradients.inputs.to(scores.dtype).log()
    scores += layer.gradients.row_weights().to(scores.dtype).log()[:, None]
    bins = (
        scores.clamp_(_LOWEST, _HIGHEST)
        .sub_(_LOWEST)
        .mul_((_BINS - 1) / (_HIGHEST - _LOWEST))
        .to(torch.int32)
    )
    return bins.flatten().bincount(minlength=_BINS).cpu().double().cumsum(0).div_(layer.size)


def _fraction_below(distribution: Tensor, threshold: float) -> float:
    """Interpolate linearly within the bin of the threshold, which is a number of bins."""
    whole = min(int(threshold), _BINS - 1)
    before = float(distribution[whole - 1]) if whole else 0.0
    return before + (threshold - whole) * (float(distribution[whole]) - before)
