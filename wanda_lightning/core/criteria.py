"""Criteria score the weights of a layer; the smallest scores are pruned."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from wanda_lightning.common.checks import Number, check
from wanda_lightning.common.float64 import widened
from wanda_lightning.core.statistics import InputStatistics
from wanda_lightning.core.types import PerInput, Score, Weight

Group = Literal["row", "layer"]


class Criterion(ABC):
    """A score for each weight, from its value and the inputs of its layer.

    Attributes:
        needs: The input statistics that it reads, by their names in `core.statistics.SUMS`.
        group: Where the method's paper compares weights in unstructured pruning: within a row or within the layer.
        spans_rows: Whether the score of a weight depends on other rows.
        spans_columns: Whether the score depends on the weights of other columns. A solver that chooses in blocks of
            columns cannot use it then.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    group: ClassVar[Group] = "row"
    spans_rows: ClassVar[bool] = False
    spans_columns: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, weight: Weight, inputs: InputStatistics) -> Score:
        """Return the score of every weight, in float32 or wider; higher scores survive."""


@dataclass(frozen=True)
class Magnitude(Criterion):
    """The absolute value of the weight; needs no calibration data (Han et al. 2015)."""

    group = "layer"

    def __call__(self, weight: Weight, inputs: InputStatistics) -> Score:
        """Score by `|W|`."""
        return _magnitude(weight)


@dataclass(frozen=True)
class Wanda(Criterion):
    """Weight magnitude times the norm of the input it multiplies (Sun et al. 2024, eq. 1)."""

    needs = frozenset({"square_sum"})

    def __call__(self, weight: Weight, inputs: InputStatistics) -> Score:
        """Score by `|W| * ||x||`, with the norm of each input over all calibration tokens."""
        norm = inputs.norm()
        return lower_inactive(_magnitude(weight).mul_(norm), weight, norm)


@dataclass(frozen=True)
class RIA(Criterion):
    """Relative importance and activations (Zhang et al. 2024).

    `(|W| / sum of |W| over its row + |W| / sum of |W| over its column) * ||x||^a`. Relative to their column, small
    weights can score high, so a column of small weights is not pruned as a whole. The paper's channel permutation for
    N:M is left out.

    Attributes:
        a: Exponent of the input norm; 0 ignores the inputs.
    """

    needs = frozenset({"square_sum"})
    spans_rows = True
    spans_columns = True
    a: float = 0.5

    def __post_init__(self) -> None:
        check(self, a=Number(minimum=0))

    def __call__(self, weight: Weight, inputs: InputStatistics) -> Score:
        """Score by relative importance and input norm."""
        magnitude = _magnitude(weight)
        # Clamped sums give the weights of a row or column of zeros the score 0, not NaN.
        tiny = torch.finfo(magnitude.dtype).tiny
        row_sums = magnitude.sum(dim=1, keepdim=True).clamp(min=tiny)
        column_sums = magnitude.sum(dim=0, keepdim=True).clamp(min=tiny)
        scores = magnitude / row_sums
        scores += magnitude.div_(column_sums)

        norm = inputs.norm()
        return lower_inactive(scores.mul_(norm**self.a), weight, norm)


@dataclass(frozen=True)
class Saliency(Criterion):
    """The output error of pruning a weight if the weights to its right compensate for it as well as they can.

    `|w_q| / U_qq`, with the upper triangular factor `U` of the inverse Gram matrix: the square root of the optimal
    brain surgeon's saliency (Hassibi & Stork 1993; Frantar & Alistarh 2023, eq. 5). The criterion of `SparseGPT`.

    Attributes:
        dampening: Added to the diagonal of the Gram matrix, as a fraction of its mean.
    """

    needs = frozenset({"gram"})
    group = "layer"
    dampening: float = 0.01

    def __post_init__(self) -> None:
        check(self, dampening=Number(above=0))

    def __call__(self, weight: Weight, inputs: InputStatistics) -> Score:
        """Score by `|W| / diag(U)`."""
        scores = _magnitude(weight).div_(inputs.inverse_diagonal(self.dampening))
        # SparseGPT passes the statistics of a block of columns, and prunes inactive inputs itself.
        if "gram" not in inputs.sums:
            return scores
        return lower_inactive(scores, weight, inputs.sums["gram"].diagonal())


def lower_inactive(scores: Score, weight: Weight, norm: PerInput) -> Score:
    """Give the weights of inputs with norm 0 the lowest scores, in place: 0 to zeros, a tiny number to the others.

    If all of them scored 0, a second pruning could choose other weights than the first one.
    """
    inactive = norm == 0
    if inactive.any():
        scores[:, inactive] = 0
        scores[inactive & (weight != 0)] = torch.finfo(scores.dtype).tiny
    return scores


def _magnitude(weight: Weight) -> Score:
    # float32 or wider: in bfloat16, the scores of different weights would be equal.
    return widened(weight.abs())
