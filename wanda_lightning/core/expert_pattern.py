"""The pattern that drops whole experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from wanda_lightning.core.keep_largest import keep_largest
from wanda_lightning.core.patterns import Pattern
from wanda_lightning.core.types import KeepMask, Score


@dataclass(frozen=True)
class Experts(Pattern):
    """Whole experts leave each mixture of experts, the same number in every layer; `prune` makes the model smaller.

    Zeros cannot represent this: a row of zeros in the router is a logit of 0, which may be among the largest. So
    `prune` takes the experts out in place, with their rows of the router, and changes the model's configuration.

    An expert is scored by REAP (Lasby et al. 2025, arXiv 2510.13999): the mean, over the tokens that are routed to it,
    of its gate times the norm of its output.
    """

    drops_experts: ClassVar[bool] = True

    def kept(self, number: int, sparsity: float) -> int:
        """Return how many of `number` experts are kept; the nearest number, which may be none or all.

        Example:
            >>> Experts().kept(128, 0.25), Experts().kept(8, 0.3)
            (96, 6)
        """
        return round(number * (1 - sparsity))

    def __call__(self, scores: Score, sparsity: float) -> KeepMask:
        """Keep the experts with the largest scores of each group: a row has the experts of one group."""
        return keep_largest(scores, self.kept(scores.shape[1], sparsity))
