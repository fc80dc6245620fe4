"""Prune a layer from left to right, and let the columns on the right compensate for the pruned weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import lcm
from typing import ClassVar, Literal

import torch
from torch import Tensor

from wanda_lightning.common.checks import Number, check
from wanda_lightning.core.criteria import Criterion, Group, Saliency
from wanda_lightning.core.masking import as_numbers, mask_
from wanda_lightning.core.patterns import ColumnBlock
from wanda_lightning.core.selection import Selection
from wanda_lightning.core.solvers.solver import Solver
from wanda_lightning.core.statistics import InputStatistics
from wanda_lightning.core.types import Gram, KeepMask, OneMask, OneWeight, Weight

_AT_ONCE = 32  # number of columns that update each other one by one; one matrix product updates those on the right


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

    dampening: float = 0.01
    block_size: int = 128
    mask: Literal["block", "upfront"] = "block"

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})

    def __post_init__(self) -> None:
        whole = Number(minimum=1, whole=True)
        check(self, dampening=Number(above=0), block_size=whole, mask=("block", "upfront"))

    @property
    def chooses_in_blocks(self) -> bool:
        """True unless the mask is chosen upfront."""
        return self.mask == "block"

    def group(self, criterion: Criterion) -> Group:
        """The layer, or the group of the criterion if the mask is chosen upfront."""
        return "layer" if self.mask == "block" else criterion.group

    @property
    def own_criterion(self) -> Criterion:
        """`Saliency` with the same dampening."""
        return Saliency(self.dampening)

    def __call__(
        self, weight: Weight, inputs: InputStatistics, selection: Selection
    ) -> tuple[Weight, KeepMask]:
        """Choose and update from left to right."""
        return self.solve_together([weight], inputs, [selection])[0]

    def solve_together(
        self, weights: Sequence[OneWeight], inputs: InputStatistics, selections: Sequence[Selection]
    ) -> list[tuple[OneWeight, OneMask]]:
        """Solve the rows of all layers as one matrix, since the time for a column hardly depends on their number."""
        factor = inputs.inverse_factor(self.dampening)
        # Transposed, so that each column is contiguous in memory.
        columns = torch.cat([weight.to(factor.dtype).t() for weight in weights], dim=1)
        alive = (columns != 0) & (inputs.sums["gram"].diagonal() != 0)[:, None]
        columns.mul_(as_numbers(alive))
        # 1 or 0, since multiplying by booleans is many times slower.
        pruned = torch.empty_like(columns)
        ends = list(accumulate(len(weight) for weight in weights))
        rows = [slice(end - len(weight), end) for end, weight in zip(ends, weights, strict=True)]
        choosers: list[_Chooser] = []
        if self.mask == "upfront":
            for weight, own, selection in zip(weights, rows, selections, strict=True):
                pruned[:, own] = as_numbers(~(selection.keep(weight, inputs).t() & alive[:, own]))
        else:
            choosers = [
                _Chooser(selection, inputs, columns[:, own], alive[:, own], pruned[:, own])
                for own, selection in _merge_same_groups(rows, selections)
            ]
        self._prune_columns(columns, pruned, factor, choosers)
        keep = pruned == 0
        del pruned, choosers  # or the copies below would come on top of them
        mask_(columns, keep)
        solved = []
        for weight, own in zip(weights, rows, strict=True):
            part = columns[:, own].t().to(weight.dtype, memory_format=torch.contiguous_format)
            solved.append((part, keep[:, own].t().contiguous()))
        return solved

    def _prune_columns(
        self, columns: Tensor, pruned: Tensor, factor: Gram, choosers: Sequence[_Chooser]
    ) -> None:
        """Update `columns` in place for the weights marked in `pruned`, which the choosers fill in column by column."""
        by_block = [chooser for chooser in choosers if not chooser.group_size]
        by_group = [chooser for chooser in choosers if chooser.group_size]
        multiple = lcm(*(chooser.group_size for chooser in by_group))
        block_size, at_once = (
            max(1, size // multiple) * multiple for size in (self.block_size, _AT_ONCE)
        )
        for start in range(0, len(columns), block_size):
            stop = min(start + block_size, len(columns))
            block = columns[start:stop]
            errors = torch.empty_like(columns[start:stop])
            scaled = factor[start:stop, start:] / factor.diagonal()[start:stop, None]
            for chooser in by_block:
                chooser.choose(start, stop)
            for first in range(start, stop, at_once):
                last = min(first + at_once, stop)
                now = slice(first, last)
                own = slice(first - start, last - start)
                steps = zip(
                    columns[now].unbind(),
                    pruned[now].unbind(),
                    scaled[own, own].unbind(),
                    strict=True,
                )
                for index, (column, column_pruned, row) in enumerate(steps):
                    for chooser in by_group:
                        if index % chooser.group_size == 0:
                            chooser.choose(first + index, first + index + chooser.group_size)
                    error = torch.mul(column, column_pruned, out=errors[first - start + index])
                    columns[first + index + 1 : last].addr_(row[index + 1 :], error, alpha=-1)
                _subtract(
                    block[last - start :], scaled[own, last - start : stop - start], errors[own]
                )
            _subtract(columns[stop:], scaled[:, stop - start :], errors)


class _Chooser:
    """Chooses the mask of some rows: one group of columns at a time for N:M, otherwise one block at a time.

    It reads the transposed weights (`columns`), which the solver updates, and writes 1 into `pruned` for a pruned
    weight and 0 for a kept one. `alive` says which weights were not zero at the start.
    """

    def __init__(
        self,
        selection: Selection,
        inputs: InputStatistics,
        columns: Tensor,
        alive: Tensor,
        pruned: Tensor,
    ) -> None:
        self.group_size = selection.pattern.group_size
        self._selection = selection
        self._inputs = inputs
        self._columns = columns
        self._alive = alive
        self._pruned = pruned
        self._zeros_left = torch.zeros(columns.shape[1], dtype=torch.int64, device=columns.device)
        self._zeros_right = (~alive).sum(dim=0)

    def choose(self, start: int, stop: int) -> None:
        """Choose in some columns, after all columns to their left have been chosen and have updated them."""
        alive = self._alive[start:stop]
        # Updates have changed weights that were zero at the start; as zeros, they score lowest.
        weight = self._columns[start:stop].mul(as_numbers(alive)).t().contiguous()
        scores = self._selection.score(weight, self._inputs.columns(start, stop))
        if self.group_size:
            self._pruned[start:stop] = as_numbers(~(self._selection.choose(scores).t() & alive))
            return
        self._zeros_right = self._zeros_right - (~alive).sum(dim=0)
        block = ColumnBlock(stop, len(self._columns), self._zeros_left, self._zeros_right)
        pruned = ~(self._selection.choose_block(scores, block).t() & alive)
        self._zeros_left = self._zeros_left + pruned.sum(dim=0)
        self._pruned[start:stop] = as_numbers(pruned)


def _merge_same_groups(
    rows: Sequence[slice], selections: Sequence[Selection]
) -> list[tuple[slice, Selection]]:
    """Merge consecutive layers with the same N:M selection, since it treats each row on its own."""
    merged: list[tuple[slice, Selection]] = []
    for own, selection in zip(rows, selections, strict=True):
        independent = selection.pattern.group_size and not selection.criterion.spans_rows
        if independent and merged and merged[-1][1] == selection:
            merged[-1] = slice(merged[-1][0].start, own.stop), selection
        else:
            merged.append((own, selection))
    return merged


def _subtract(columns: Tensor, factor: Tensor, errors: Tensor) -> None:
    if len(columns):
        columns.addmm_(factor.t(), errors, alpha=-1)
