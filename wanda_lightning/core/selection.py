"""The choices that decide which weights of one layer are kept."""

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
        # A sum of numbers with NaN is NaN: one fast pass, where the check of each number would need a copy.
        may_hold_nan = bool(scores.sum().isnan())
        if scores.shape != weight.shape or (may_hold_nan and scores.isnan().any()):
            raise UserError(
                f"criterion={self.criterion} must return a score for each weight, none of them NaN, but for "
                f"{tuple(weight.shape)} weights it returned {tuple(scores.shape)} scores, with "
                f"{int(scores.isnan().sum())} NaN."
            )
        return scores

    def choose(self, scores: Score, block: ColumnBlock | None = None) -> KeepMask:
        """Return what to keep in the layer, or in a block of its columns, given the scores; see `Pattern`."""
        weighed = scores
        if self.pattern.weigh_rows:
            # Scores are roots of squared errors, hence the square root.
            weighed = scores * self.row_weights.sqrt().to(scores)[:, None]
        if block is None:
            keep = self.pattern(weighed, self.sparsity)
        else:
            keep = self.pattern.keep_block(weighed, self.sparsity, block)
        if keep.shape != scores.shape or keep.dtype != torch.bool:
            raise UserError(
                f"pattern={self.pattern} must return a boolean for each score, but for {tuple(scores.shape)} scores it "
                f"returned a tensor of {keep.dtype} with the shape {tuple(keep.shape)}."
            )
        return keep

    def total_error(self, errors: Tensor) -> Tensor:
        """Sum the squared errors of the rows, (d_out,), each times its weight if the pattern weighs rows."""
        if self.pattern.weigh_rows:
            errors = errors * self.row_weights.to(errors)
        return errors.sum()
