"""Prune a layer from left to right, and let the columns on the right compensate for the pruned weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import lcm
from typing import Literal

import torch
from torch import Tensor

from wanda_lightning.common.checks import COUNT, Number, check
from wanda_lightning.core.criteria import Criterion, Group, Saliency
from wanda_lightning.core.masking import as_numbers, mask_
from wanda_lightning.core.patterns import ColumnBlock
from wanda_lightning.core.selection import Selection
from wanda_lightning.core.solvers.solver import Solver
from wanda_lightning.core.statistics import InputStatistics
from wanda_lightning.core.types import Gram, OneSolved, OneWeight, Solved, Weight

# Number of columns that update each other one by one; one matrix product updates those to their right.
_AT_ONCE = 32


@dataclass(frozen=True)
class SparseGPT(Solver):
    """Prune the columns from left to right, and update the columns on the right to compensate for the pruned weights.

    With the upper triangular `U` that satisfies `U^T U = (X^T X + dampening)^-1`, pruning weight q changes the rest of
    its row by `-w_q / U_qq * U_q`, the update of the optimal brain surgeon (Frantar & Alistarh 2023, algorithm 1). The
    default criterion is `Saliency`, the error that remains after this update. With `Magnitude` or `Wanda`, this is the
    weight-update ablation of Sun et al. 2024 (section 5). Zeros stay zero, and all weights of inputs that are never
    active are pruned.

    Attributes:
        dampening: Added to the diagonal, as a fraction of its mean.
        block_size: Number of columns in which weights are chosen together, after the updates from all earlier columns.
        mask: Choose block by block from the updated weights (`"block"`), or all weights before the first update
            (`"upfront"`).
    """

    needs = frozenset({"gram"})
    dampening: float = 0.01
    block_size: int = 128
    mask: Literal["block", "upfront"] = "block"

    def __post_init__(self) -> None:
        check(self, dampening=Number(above=0), block_size=COUNT, mask=("block", "upfront"))

    @property
    def chooses_in_blocks(self) -> bool:
        """Whether the mask is not chosen upfront."""
        return self.mask == "block"

    def group(self, criterion: Criterion) -> Group:
        """The layer, or the group of the criterion if the mask is chosen upfront."""
        return criterion.group if self.mask == "upfront" else "layer"

    @property
    def own_criterion(self) -> Criterion:
        """`Saliency` with the same dampening."""
        return Saliency(self.dampening)

    def __call__(self, weight: Weight, inputs: InputStatistics, selection: Selection) -> Solved:
        """Choose and update from left to right."""
        return self.solve_together([weight], inputs, [selection])[0]

    def solve_together(
        self, weights: Sequence[OneWeight], inputs: InputStatistics, selections: Sequence[Selection]
    ) -> list[OneSolved]:
        """Solve the rows of all layers as one matrix, since the time for a column hardly depends on their number."""
        factor = inputs.inverse_factor(self.dampening)
        # Transposed, so that each column is contiguous in memory.
        columns = torch.cat([weight.to(factor.dtype).t() for weight in weights], dim=1)
        alive = (columns != 0) & (inputs.sums["gram"].diagonal() != 0)[:, None]
        columns.mul_(as_numbers(alive))
        # 1 or 0, since multiplying by booleans is many times slower.
        pruned = torch.empty_like(columns)

        ends = accumulate(len(weight) for weight in weights)
        rows_of = [slice(end - len(weight), end) for end, weight in zip(ends, weights, strict=True)]
        choosers = []
        if self.mask == "upfront":
            keep = [
                selection.keep(weight, inputs).t()
                for weight, selection in zip(weights, selections, strict=True)
            ]
            pruned.copy_(as_numbers(~(torch.cat(keep, dim=1) & alive)))
        else:
            for rows, selection in _merge_same_groups(rows_of, selections):
                choosers.append(
                    _Chooser(selection, inputs, columns[:, rows], alive[:, rows], pruned[:, rows])
                )
        self._prune_columns(columns, pruned, factor, choosers)

        kept = pruned == 0
        del pruned, choosers  # or the copies below would come on top of them
        mask_(columns, kept)
        solved = []
        for weight, rows in zip(weights, rows_of, strict=True):
            part = columns[:, rows].t().to(weight.dtype, memory_format=torch.contiguous_format)
            solved.append((part, kept[:, rows].t().contiguous()))
        return solved

    def _prune_columns(
        self, columns: Tensor, pruned: Tensor, factor: Gram, choosers: Sequence[_Chooser]
    ) -> None:
        """Update `columns` in place for the weights marked in `pruned`, which choosers fill in from left to right."""
        by_block = [chooser for chooser in choosers if not chooser.group_size]
        by_group = [chooser for chooser in choosers if chooser.group_size]
        # No group of N:M may lie across the end of a block.
        multiple = lcm(*(chooser.group_size for chooser in by_group))
        block_size = max(1, self.block_size // multiple) * multiple
        at_once = max(1, _AT_ONCE // multiple) * multiple

        for start in range(0, len(columns), block_size):
            stop = min(start + block_size, len(columns))
            for chooser in by_block:
                chooser.choose(start, stop)

            # A pruned weight w of a column changes the columns to its right by -w times the column's row of `factors`.
            factors = factor[start:stop, start:] / factor.diagonal()[start:stop, None]
            errors = torch.empty_like(columns[start:stop])
            for first in range(start, stop, at_once):
                last = min(first + at_once, stop)
                # One by one, each of these columns updates those to its right.
                for index in range(first, last):
                    for chooser in by_group:
                        if index % chooser.group_size == 0:
                            chooser.choose(index, index + chooser.group_size)
                    place = index - start  # in the block
                    error = torch.mul(columns[index], pruned[index], out=errors[place])
                    right = slice(place + 1, last - start)
                    columns[index + 1 : last].addr_(factors[place, right], error, alpha=-1)

                few = slice(first - start, last - start)
                right = slice(last - start, stop - start)
                columns[last:stop].addmm_(factors[few, right].t(), errors[few], alpha=-1)
            columns[stop:].addmm_(factors[:, stop - start :].t(), errors, alpha=-1)


@dataclass
class _Chooser:
    """Chooses the mask of some rows: one group of columns at a time for N:M, otherwise one block at a time."""

    selection: Selection
    inputs: InputStatistics
    columns: Tensor  # the transposed weights, which the solver updates
    alive: Tensor  # which weights were not zero at the start
    pruned: Tensor  # receives 1 for a pruned weight, and 0 for a kept one

    def __post_init__(self) -> None:
        self.group_size = self.selection.pattern.group_size
        self._zeros_right = (~self.alive).sum(dim=0)
        self._zeros_left = torch.zeros_like(self._zeros_right)

    def choose(self, start: int, stop: int) -> None:
        """Choose in some columns, after all columns to their left have been chosen and have updated them."""
        alive = self.alive[start:stop]
        # Updates have changed weights that were zero at the start; as zeros, they score lowest.
        weight = self.columns[start:stop].mul(as_numbers(alive)).t().contiguous()
        scores = self.selection.score(weight, self.inputs.columns(start, stop))
        block = None
        if not self.group_size:
            self._zeros_right = self._zeros_right - (~alive).sum(dim=0)
            block = ColumnBlock(stop, len(self.columns), self._zeros_left, self._zeros_right)

        pruned = ~(self.selection.choose(scores, block).t() & alive)
        self._zeros_left = self._zeros_left + pruned.sum(dim=0)
        self.pruned[start:stop] = as_numbers(pruned)


def _merge_same_groups(
    rows_of: Sequence[slice], selections: Sequence[Selection]
) -> Iterable[tuple[slice, Selection]]:
    """Merge consecutive layers with the same N:M selection, since it treats each row on its own."""
    merged: list[tuple[slice, Selection]] = []
    for rows, selection in zip(rows_of, selections, strict=True):
        independent = selection.pattern.group_size and not selection.criterion.spans_rows
        if independent and merged and merged[-1][1] == selection:
            previous_rows, _ = merged.pop()
            rows = slice(previous_rows.start, rows.stop)
        merged.append((rows, selection))
    return merged
