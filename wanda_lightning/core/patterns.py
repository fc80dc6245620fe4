"""Patterns turn scores into the mask of the weights to keep.

Row-wise, layer-wise and N:M pruning are three views of one operation: view the scores as a (groups, size) matrix, and
keep the largest scores of each group.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from wanda_lightning.common.checks import COUNT, Number, check
from wanda_lightning.common.errors import UserError
from wanda_lightning.core.keep_largest import (
    keep_largest,
    keep_largest_of_each,
    nondeterministic_kernels,
)
from wanda_lightning.core.types import Groups, KeepMask, PerRow, Score

Removed = Literal["weights", "units", "experts"]


def zeros_among(size: int, sparsity: float) -> int:
    """Return how many of `size` weights become zero: rounded down in floating point, as in the reference code.

    Example:
        >>> zeros_among(20800, 0.7)  # since 0.7 * 20800 is 14559.999999999998
        14559
    """
    return int(size * sparsity)


@dataclass(frozen=True)
class ColumnBlock:
    """A block of a layer's columns and the zeros on both sides, for a solver that prunes columns from left to right."""

    stop: int  # number of columns up to the end of the block
    d_in: int  # number of columns of the layer
    zeros_left: PerRow  # of each row, to the left of the block
    zeros_right: PerRow  # that each row already has to the right of the block, and keeps


class Pattern(ABC):
    """Structure of the zeros of a layer: where they may be, and how many there are.

    Attributes:
        weigh_rows: Whether the scores of each row are scaled by the importance of its output before they are compared;
            None if the model decides.
        removes: What leaves the model: single weights, whole hidden units, or whole experts.
    """

    weigh_rows: bool | None = False
    removes: ClassVar[Removed] = "weights"

    @property
    def reads_batches(self) -> bool:
        """Whether calibration batches are needed to choose what leaves, apart from the scores."""
        return self.weigh_rows is not False

    def sequential(self, chosen: str) -> str:
        """Return what a choice of `sequential` means for a language model: `"auto"` and `"one_pass"` are resolved."""
        return {"auto": "block", "one_pass": "layer"}.get(chosen, chosen)

    @property
    def group_size(self) -> int:
        """Number of consecutive columns of a row that form a group; 0 if the pattern has no such groups."""
        return 0

    @property
    def fixed_sparsity(self) -> float | None:
        """The only sparsity that the pattern can have; None if it can have any."""
        return None

    def check(self, sparsity: float) -> None:  # noqa: B027  # most patterns can have any sparsity
        """Raise a ValueError for a sparsity that the pattern cannot have."""

    def why_not(self, d_in: int) -> str | None:
        """Return why a layer with `d_in` inputs cannot have the pattern, or None if it can."""
        return None

    def check_widths(  # noqa: B027  # most patterns fit every width
        self, widths: Mapping[str, int], sparsity: float, name: str
    ) -> None:
        """Raise a ValueError if the pattern called `name`, rounded, would remove nothing or everything.

        `widths` holds the number of hidden units that each layer reads, or at most reads.
        """

    def sparsity_steps(self, d_out: int, d_in: int) -> int:
        """Return the number of equal steps in which the sparsity of a layer can rise from 0 to 1."""
        return d_out * d_in

    def for_sparsity(self, sparsity: float) -> Pattern:
        """Return the pattern for one layer with this sparsity, if an allocation gives each layer its own."""
        return self

    @abstractmethod
    def __call__(self, scores: Score, sparsity: float) -> KeepMask:
        """Return what to keep; higher scores survive."""

    def keep_block(self, scores: Score, sparsity: float, block: ColumnBlock) -> KeepMask:
        """Return what to keep in a block of columns, so that the layer has the sparsity once all columns are chosen.

        Existing zeros score 0 and count. By default, the block makes up for missing or extra zeros to its left.
        """
        missing = sparsity * block.stop * len(scores) - int(block.zeros_left.sum())
        return self(scores, max(0.0, missing / scores.numel()))


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Zeros may be anywhere; exactly `zeros_among(size, sparsity)` weights of each comparison group become zero.

    Attributes:
        group: Which weights are compared: those in each row (the Wanda paper's choice), or all weights of the layer.
        weigh_rows: Scale the scores of each row by the root mean square of the gradients at its output, so that
            rows on which the predictions depend more keep more weights. It costs one backward pass of the dense model.
            None does so except for image models, where it does not pay.
    """

    group: Literal["row", "layer"] = "row"
    weigh_rows: bool | None = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        check(self, group=("row", "layer"), weigh_rows=(True, False, None))
        if self.weigh_rows is not False and self.group == "row":
            raise UserError(
                "weigh_rows of Unstructured must be False for group='row', which compares the weights of one row only. "
                "Use group='layer'."
            )

    def sparsity_steps(self, d_out: int, d_in: int) -> int:
        """Return the number of weights of a comparison group."""
        return d_in if self.group == "row" else d_out * d_in

    def __call__(self, scores: Score, sparsity: float) -> KeepMask:
        """Keep the largest scores of each group."""
        groups = self._groups(scores)
        size = groups.shape[1]
        return keep_largest(groups, size - zeros_among(size, sparsity)).reshape(scores.shape)

    def keep_block(self, scores: Score, sparsity: float, block: ColumnBlock) -> KeepMask:
        """Prune the number due in each group by the end of the block; fewer if zeros to its right need the room."""
        groups = self._groups(scores)
        number, size = groups.shape
        rows = len(scores) // number  # in each group
        left = block.zeros_left.reshape(number, rows).sum(dim=1)
        right = block.zeros_right.reshape(number, rows).sum(dim=1)

        due = zeros_among(rows * block.stop, sparsity) - left
        room = zeros_among(rows * block.d_in, sparsity) - left - right
        pruned = torch.minimum(due, room).clamp(0, size)
        return keep_largest_of_each(groups, size - pruned).reshape(scores.shape)

    def _groups(self, scores: Score) -> Groups:
        return scores if self.group == "row" else scores.reshape(1, -1)


@dataclass(frozen=True)
class NM(Pattern):
    """N weights survive in every M consecutive inputs of a row, the layout of sparse tensor cores (2:4).

    Attributes:
        n: Number of weights that survive in each group.
        m: Size of a group.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        # So that messages can show the sparsity.
        check(self, m=Number(minimum=2, maximum=10**6, whole=True))
        check(self, n=Number(minimum=1, whole=True))
        if self.n >= self.m:
            raise UserError(
                f"pattern N:M keeps N of every M weights, as 2:4 keeps two of four, so N must be below M, but it is "
                f"{self.n}:{self.m}."
            )

    @property
    def group_size(self) -> int:
        """`m`."""
        return self.m

    @property
    def sparsity(self) -> float:
        """`1 - n/m`."""
        return 1 - self.n / self.m

    @property
    def fixed_sparsity(self) -> float | None:
        """`1 - n/m`."""
        return self.sparsity

    def check(self, sparsity: float) -> None:
        """Refuse every sparsity but `1 - n/m`."""
        if abs(sparsity - self.sparsity) > 1e-6:
            raise UserError(
                f"sparsity must be {self.sparsity:g} for the pattern {self.n}:{self.m}, but it is {sparsity:g}. "
                f"Give sparsity={self.sparsity:g}, or pattern='unstructured' for any sparsity."
            )

    def why_not(self, d_in: int) -> str | None:
        """Refuse a width that is not a multiple of `m`.

        Example:
            >>> NM(2, 4).why_not(27)
            'input width 27 is not a multiple of 4'
        """
        if d_in % self.m == 0:
            return None
        return f"input width {d_in} is not a multiple of {self.m}"

    def sparsity_steps(self, d_out: int, d_in: int) -> int:
        """Return the size of a group."""
        return self.m

    def for_sparsity(self, sparsity: float) -> Pattern:
        """Return the nearest n of the same m, at least 1; if all weights survive, the layer stays dense.

        Example:
            >>> NM(4, 8).for_sparsity(0.65), NM(4, 8).for_sparsity(0.0)
            (NM(n=3, m=8), Unstructured(group='row', weigh_rows=False))
        """
        n = max(1, self.m - round(sparsity * self.m))
        return NM(n, self.m) if n < self.m else Unstructured()

    def __call__(self, scores: Score, sparsity: float) -> KeepMask:
        """Keep the `n` largest scores of every `m`."""
        return keep_largest(scores.reshape(-1, self.m), self.n).reshape(scores.shape)


@dataclass(frozen=True)
class EqualShare(Pattern):
    """Each row loses the same share of its total score, so rows differ in sparsity: the paper's "variant".

    A row is cut where the cumulative sum of its sorted scores reaches `share` of the row's total. A bisection finds one
    share for the matrix, starting at 0.4 in [0, 0.8], until the sparsity is within 0.001 of the target or the bracket
    is narrower than 0.001 (Sun et al. 2024, `--use_variant`). A share of 0.8 may be too small for a high sparsity.
    """

    def __call__(self, scores: Score, sparsity: float) -> KeepMask:
        """Find the share, and keep what is above each row's cut."""
        tolerance = 0.001
        if sparsity == 0:
            return torch.ones_like(scores, dtype=torch.bool)

        already_zero = (scores == 0).float().mean().item()
        if abs(already_zero - sparsity) <= tolerance:  # pruning twice changes nothing
            return scores > 0

        ascending = scores.sort(dim=1).values
        with nondeterministic_kernels():
            running = ascending.cumsum(dim=1)
        total = scores.sum(dim=1, keepdim=True)
        low = 0.0
        share = 0.4
        high = 0.8
        while True:
            # A row whose smallest score exceeds the share has no cut: its level is below all scores.
            cut = (running <= total * share).sum(dim=1, keepdim=True) - 1
            level = ascending.gather(1, cut.clamp(min=0)).masked_fill(cut < 0, -1.0)
            keep = scores > level

            reached = 1 - keep.float().mean().item()
            if abs(reached - sparsity) <= tolerance or high - low < tolerance:
                return keep
            if reached > sparsity:
                high = share
            else:
                low = share
            share = (low + high) / 2


@dataclass(frozen=True)
class Structured(Pattern):
    """Zeros fill whole hidden units, so that they can be taken out and an ordinary smaller model is left.

    A unit is a column of the layer that reads it. The score of a unit is the sum over the rows of the squared scores of
    its weights: with `Wanda` that of FASP (Hu et al. 2025, arXiv 2501.09412). `shrink` also removes what writes the
    unit: the rows and biases of other layers, and vectors with one entry for each unit.

    Attributes:
        multiple_of: The number of kept units of a layer is rounded to a multiple of this, at least one.
        columns: Columns of each unit: as many as the kernel of a convolution has positions; `shrink` sets it.
    """

    removes = "units"
    reads_batches = True
    multiple_of: int = 8
    columns: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        check(self, multiple_of=COUNT, columns=COUNT)

    def sequential(self, chosen: str) -> str:
        """Return `"layer"` unless the user chose otherwise.

        A block usually has one layer that reads units, so the statistics are those of `"block"`, in one pass instead of
        two.
        """
        return "layer" if chosen in ("auto", "one_pass") else chosen

    def check_widths(self, widths: Mapping[str, int], sparsity: float, name: str) -> None:
        """Refuse to remove no unit of any layer, or all units of the widest."""
        if not widths:
            return
        layer, widest = max(widths.items(), key=lambda item: item[1])
        if widest <= self.multiple_of:
            problem = f"multiple_of={self.multiple_of} leaves no unit to remove"
        elif self.multiples(widest, sparsity) < 1:
            problem = f"{name} would remove all {widest} hidden units"
        else:
            return
        raise UserError(
            f"{problem}: the widest layer, {layer}, reads {widest}, in multiples of {self.multiple_of}. "
            "Remove fewer units, or choose a smaller multiple_of."
        )

    def sparsity_steps(self, d_out: int, d_in: int) -> int:
        """Return how many multiples of `multiple_of` units the layer has."""
        return max(1, d_in // self.columns // self.multiple_of)

    def kept(self, width: int, sparsity: float) -> int:
        """Return how many of `width` units are kept.

        Example:
            >>> Structured().kept(1536, 0.3), Structured().kept(1536, 0.0)
            (1072, 1536)
        """
        if sparsity == 0:
            return width
        return min(width, max(1, self.multiples(width, sparsity)) * self.multiple_of)

    def multiples(self, width: int, sparsity: float) -> int:
        """Return how many multiples of `multiple_of` are nearest to the units that a sparsity leaves; perhaps none."""
        return round(width * (1 - sparsity) / self.multiple_of)

    def __call__(self, scores: Score, sparsity: float) -> KeepMask:
        """Keep the units with the largest scores."""
        column_scores = scores.square().sum(dim=0)
        unit_scores = column_scores.unflatten(0, (self.columns, -1)).sum(dim=0)
        keep = keep_largest(unit_scores[None], self.kept(len(unit_scores), sparsity))[0]
        return keep.repeat(self.columns).expand_as(scores).contiguous()


@dataclass(frozen=True)
class Experts(Pattern):
    """Whole experts leave each mixture of experts, the same number in every layer.

    Zeros cannot represent this: a row of zeros in the router is a logit of 0, which may be among the largest. So
    `shrink` takes the experts out in place, with their rows of the router, and changes the model's configuration.

    What an expert adds for a token is its gate times its output. An expert is scored by the sum of the norms of this
    over all tokens: REAP (Lasby et al. 2025, arXiv 2510.13999) without its division by the number of tokens.
    """

    removes = "experts"
    reads_batches = True

    def sequential(self, chosen: str) -> str:
        """Return `"block"`, or by default `"none"`: all experts are scored in the dense model."""
        return "block" if chosen in ("block", "layer") else "none"

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
