"""Criteria give each weight a score; the smallest scores are pruned."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from wanda_lightning.core.statistics import InputStatistics
from wanda_lightning.core.types import PerInput, Score, Weight

Group = Literal["row", "layer"]


class Criterion(ABC):
    """How much a weight matters, from its value and what enters its layer."""

    needs: ClassVar[frozenset[str]]
    group: ClassVar[Group] = "row"  # what the method's paper compares where the pattern is unstructured
    spans_rows: ClassVar[bool] = False  # whether a score depends on other rows, so that no process can score its alone

    @abstractmethod
    def __call__(self, weight: Weight, inputs: InputStatistics) -> Score:
        """Score every weight, in float32 or wider; higher survives."""


@dataclass(frozen=True)
class Magnitude(Criterion):
    """The absolute value of the weight; needs no calibration data (Han et al. 2015)."""

    needs: ClassVar[frozenset[str]] = frozenset()
    group: ClassVar[Group] = "layer"

    def __call__(self, weight: Weight, inputs: InputStatistics) -> Score:
        """Score by `|W|`."""
        return _magnitude(weight)


@dataclass(frozen=True)
class Wanda(Criterion):
    """Weight magnitude times the norm of the input it multiplies (Sun et al. 2024, eq. 1)."""

    needs: ClassVar[frozenset[str]] = frozenset({"square_sum"})

    def __call__(self, weight: Weight, inputs: InputStatistics) -> Score:
        """Score by `|W| * ||x||`, the norm taken per input column over all calibration tokens."""
        norm = inputs.norm()
        return with_inactive(_magnitude(weight).mul_(norm), weight, norm)


@dataclass(frozen=True)
class RIA(Criterion):
    """How large a weight is within its row and its column, times the norm of its input (Zhang et al. 2024).

    `(|W| / sum of |W| over its row + |W| / sum of |W| over its column) * ||x||^a`: a column of small weights is not
    lost as a whole. The paper's permutation of channels for N:M is not part of it.

    Attributes:
        a: How much activations count; 0 leaves the relative importance alone.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"square_sum"})
    spans_rows: ClassVar[bool] = True
    a: float = 0.5

    def __post_init__(self) -> None:
        if not self.a >= 0:
            raise ValueError(f"RIA raises the input norm to a power a of 0 or more, but a={self.a} was given")

    def __call__(self, weight: Weight, inputs: InputStatistics) -> Score:
        """Score by relative importance and activations."""
        norm, magnitude = inputs.norm(), _magnitude(weight)
        tiny = torch.finfo(magnitude.dtype).tiny  # where all weights of a row or column are zero, so is their score
        scores = magnitude / magnitude.sum(dim=1, keepdim=True).clamp(min=tiny)
        scores += magnitude.div_(magnitude.sum(dim=0, keepdim=True).clamp(min=tiny))
        return with_inactive(scores.mul_(norm**self.a), weight, norm)


def with_inactive(scores: Score, weight: Weight, norm: PerInput) -> Score:
    """Scores, in place, where inputs of norm 0 have the lowest, and of these zeros lower ones than other weights.

    Otherwise pruning again would take other weights of such an input than at first.
    """
    inactive = norm == 0
    if inactive.any():
        scores[:, inactive] = (weight[:, inactive] != 0).to(scores.dtype) * torch.finfo(scores.dtype).tiny
    return scores


@dataclass(frozen=True)
class Saliency(Criterion):
    """What is lost by pruning a weight when the weights right of it make up for it as well as they can.

    `|w_q| / U_qq` with `U` the upper factor of the inverse Gram matrix: the root of the optimal brain surgeon's
    saliency (Hassibi & Stork 1993; Frantar & Alistarh 2023, eq. 5). Made for `SparseGPT`.

    Attributes:
        dampening: Added to the diagonal of the Gram matrix, as a share of its mean.
    """

    dampening: float = 0.01

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    group: ClassVar[Group] = "layer"

    def __call__(self, weight: Weight, inputs: InputStatistics) -> Score:
        """Score by `|W| / diag(U)`."""
        scores = _magnitude(weight).div_(inputs.inverse_diagonal(self.dampening))
        if "gram" not in inputs.sums:  # some columns of SparseGPT's, which itself drops what was never active
            return scores
        return with_inactive(scores, weight, inputs.sums["gram"].diagonal())


def _magnitude(weight: Weight) -> Score:
    # float32 whatever the weight's dtype: in bf16 products of different weights fall together.
    return weight.abs().to(torch.promote_types(weight.dtype, torch.float32))


CRITERIA: dict[str, type[Criterion]] = {"magnitude": Magnitude, "wanda": Wanda, "ria": RIA, "saliency": Saliency}
