"""The choices that decide which weights of one layer are kept."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from wanda_lightning.common.errors import UserError
from wanda_lightning.core.criteria import Criterion
from wanda_lightning.core.patterns import ColumnBlock, Pattern
from wanda_lightning.core.statistics import InputStatistics
from wanda_lightning.core.types import KeepMask, RowWeights, Score, Weight


@dataclass(frozen=True)
class Selection:
    """The criterion, pattern and sparsity that decide which weights of one layer are kept."""

    criterion: Criterion
    pattern: Pattern
    sparsity: float
    # How much an error at each output matters, with mean 1, for a pattern that weighs rows.
    row_weights: RowWeights = field(
        default_factory=lambda: torch.ones(1), compare=False, repr=False
    )

    def keep(self, weight: Weight, inputs: InputStatistics) -> KeepMask:
        """Score the weights, and return the mask of those to keep."""
        return self.choose(self.score(weight, inputs))

    def score(self, weight: Weight, inputs: InputStatistics) -> Score:
        """Score the weights."""
        scores = self.criterion(weight, inputs)
        if scores.shape != weight.shape or scores.isnan().any():
            raise UserError(
                f"criterion={self.criterion} must return a score for each weight, none of them NaN, but for "
                f"{tuple(weight.shape)} weights it returned {tuple(scores.shape)} scores, with "
                f"{int(scores.isnan().sum())} NaN."
            )
        return scores

    def choose(self, scores: Score) -> KeepMask:
        """Return what to keep, given the scores."""
        keep = self.pattern(self._weigh(scores), self.sparsity)
        return self._checked(keep, scores)

    def choose_block(self, scores: Score, block: ColumnBlock) -> KeepMask:
        """Return what to keep in a block of columns, given its scores; see `Pattern.keep_block`."""
        keep = self.pattern.keep_block(self._weigh(scores), self.sparsity, block)
        return self._checked(keep, scores)

    def _checked(self, keep: Tensor, scores: Score) -> KeepMask:
        """Return what the pattern keeps; refuse anything but a boolean for each score."""
        if keep.shape != scores.shape or keep.dtype != torch.bool:
            raise UserError(
                f"pattern={self.pattern} must return a boolean for each score, but for {tuple(scores.shape)} scores it "
                f"returned a tensor of {keep.dtype} with the shape {tuple(keep.shape)}."
            )
        return keep

    def _weigh(self, scores: Score) -> Score:
        """Scale the scores of each row by the square root of its weight, if the pattern weighs rows.

        Scores are roots of squared errors, hence the square root.
        """
        if not self.pattern.weigh_rows:
            return scores
        return scores * self.row_weights.sqrt().to(scores)[:, None]

    def total_error(self, errors: Tensor) -> Tensor:
        """Sum the squared errors of the rows, (d_out,), each times its weight if the pattern weighs rows."""
        if self.pattern.weigh_rows:
            errors = errors * self.row_weights.to(errors)
        return errors.sum()
