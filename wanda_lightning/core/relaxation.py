"""Distributions over masks with one score for each weight, and their continuous relaxations.

A mask is a point of a distribution that its scores define: noise is added to the scores, and the pattern keeps the
largest sums (the Gumbel top-k trick, Kool et al. 2019). A relaxation replaces this choice by a smooth function of the
sums, through which gradients reach the scores (Jang et al. 2017, Maddison et al. 2017).
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wanda_lightning.core.keep_largest import boundary, keep_largest
from wanda_lightning.core.types import Score

_MOST_PATTERNS = 100  # each adds a number for each group to the memory of one layer


class Relaxation(ABC):
    """Turns the scores of one or more layers into masks, exactly or smoothly."""

    @abstractmethod
    def keep(self, scores: Sequence[Tensor]) -> list[Tensor]:
        """Return the masks that the largest scores define: for each layer one of booleans, (d_out, d_in)."""

    @abstractmethod
    def boundary(self, scores: Sequence[Tensor]) -> Tensor:
        """Return what `relax` must know about all layers."""

    @abstractmethod
    def relax(self, scores: Score, boundary: Tensor, temperature: float) -> Score:
        """Return a smooth mask of one layer in [0, 1], (d_out, d_in), that approaches `keep` as the temperature falls.

        It is differentiable with respect to the scores.
        """

    @abstractmethod
    def noise(self, like: Score, generator: torch.Generator) -> Score:
        """Return noise of the distribution that belongs to the relaxation, with the shape of the scores."""


@dataclass(frozen=True)
class Gates(Relaxation):
    """A gate for each weight, of which a fixed number is open; for unstructured sparsity.

    A relaxed gate is `sigmoid((score - boundary) / temperature)`, where `boundary` lies between the smallest kept and
    the largest dropped score.

    Attributes:
        kept: Number of weights of all layers that survive, above 0 and below the number of their weights.
    """

    kept: int

    def keep(self, scores: Sequence[Tensor]) -> list[Tensor]:
        """Keep the largest scores of all layers."""
        keep = keep_largest(_joined(scores), self.kept).squeeze(0)
        parts = keep.split([each.numel() for each in scores])
        return [part.reshape(each.shape) for part, each in zip(parts, scores, strict=True)]

    def boundary(self, scores: Sequence[Tensor]) -> Tensor:
        """Return the middle between the smallest kept and the largest dropped score."""
        return boundary(_joined(scores), self.kept).squeeze()

    def relax(self, scores: Score, boundary: Tensor, temperature: float) -> Score:
        """Return the sigmoid of the distance from the boundary."""
        return torch.sigmoid((scores - boundary) / temperature)

    def noise(self, like: Score, generator: torch.Generator) -> Score:
        """Return logistic noise, which is the difference of two Gumbel variables."""
        return torch.empty_like(like).uniform_(generator=generator).logit_(eps=torch.finfo(like.dtype).eps)


@dataclass(frozen=True)
class PatternChoice(Relaxation):
    """A choice among the patterns of each group of M weights, such as the six of 2:4 (MaskLLM, Fang et al. 2024).

    The logit of a pattern is the sum of the scores of the weights that it keeps, so that a layer has as many scores as
    weights, whatever the number of patterns. The relaxed mask is the mean of the patterns under the softmax of their
    logits divided by the temperature.

    Attributes:
        n: Number of weights that survive in each group.
        m: Size of a group.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if (count := math.comb(self.m, self.n)) > _MOST_PATTERNS:
            raise ValueError(
                f"pattern must have at most {_MOST_PATTERNS} choices in a group for its masks to be learned, but "
                f"{self.n}:{self.m} has {count:,}. Use 2:4 or 4:8, or pattern='unstructured'."
            )

    def keep(self, scores: Sequence[Tensor]) -> list[Tensor]:
        """Keep the `n` largest scores of each group: the pattern with the largest logit."""
        return [keep_largest(each.reshape(-1, self.m), self.n).reshape(each.shape) for each in scores]

    def boundary(self, scores: Sequence[Tensor]) -> Tensor:
        """Return 0: a group depends on its own scores only."""
        return scores[0].new_zeros(())

    def relax(self, scores: Score, boundary: Tensor, temperature: float) -> Score:
        """Return the mean of the patterns."""
        patterns = self._patterns().to(scores)
        logits = patterns @ scores.reshape(-1, self.m).t()  # (patterns, groups): a CPU computes it ten times faster
        return (patterns.t() @ (logits / temperature).softmax(dim=0)).t().reshape(scores.shape)

    def noise(self, like: Score, generator: torch.Generator) -> Score:
        """Return Gumbel noise for each weight."""
        uniform = torch.empty_like(like).uniform_(generator=generator)  # twice as fast as exponential_ on a CPU
        return uniform.clamp_(min=torch.finfo(like.dtype).tiny).log_().neg_().log_().neg_()

    def _patterns(self) -> Tensor:
        """Return all patterns, (patterns, m), as numbers 0 and 1."""
        kept = [*itertools.combinations(range(self.m), self.n)]
        return torch.zeros(len(kept), self.m).scatter_(1, torch.tensor(kept), 1.0)


def _joined(scores: Sequence[Tensor]) -> Tensor:
    """Return all scores as one group, (1, size)."""
    return torch.cat([each.detach().flatten() for each in scores]).unsqueeze(0)
