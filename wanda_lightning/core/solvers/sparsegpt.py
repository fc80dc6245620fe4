"""Choose column block by column block, and let the columns behind make up for what is lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import lcm
from typing import ClassVar, Literal

import torch
from torch import Tensor

from wanda_lightning.core.criteria import Criterion, Group, Saliency
from wanda_lightning.core.patterns import NM
from wanda_lightning.core.selection import Selection
from wanda_lightning.core.solvers.base import Solver, as_numbers, mask_
from wanda_lightning.core.statistics import InputStatistics
from wanda_lightning.core.types import KeepMask, OneMask, OneWeight, Weight

_AT_ONCE = 32  # columns whose updates are made one by one; those behind them get one product


@dataclass(frozen=True)
class SparseGPT(Solver):
    """Prune from left to right; what each pruned weight did is made up for by the weights right of it.

    With `U` the upper triangle of `U^T U = (X^T X + dampening)^-1`, pruning weight q of a row changes the others of the
    row by `-w_q / U_qq * U_q`, the optimal brain surgeon's update (Frantar & Alistarh 2023, algorithm 1). Its own
    criterion is `Saliency`, what this update cannot make up for; with `Magnitude` or `Wanda` it is the weight-update
    ablation of Sun et al. 2024 (section 5). Weights that are zero before stay so; inputs that are never active lose
    all their weights.

    Attributes:
        dampening: Added to the diagonal, as a share of its mean.
        block_size: Columns that are chosen together, after all columns left of them are done.
        mask: Chosen block by block from the updated weights (`"block"`), or all before the first update (`"upfront"`).
    """

    dampening: float = 0.01
    block_size: int = 128
    mask: Literal["block", "upfront"] = "block"

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})

    def __post_init__(self) -> None:
        if not self.dampening > 0 or self.block_size < 1 or self.mask not in ("block", "upfront"):
            raise ValueError(
                f"SparseGPT needs dampening > 0, block_size >= 1 and mask='block' or 'upfront', but got {self}"
            )

    def group(self, criterion: Criterion) -> Group:
        """The layer; where the mask is chosen upfront, what the criterion compares."""
        return "layer" if self.mask == "block" else criterion.group

    @property
    def own_criterion(self) -> Criterion:
        """What the update cannot make up for."""
        return Saliency(self.dampening)

    def __call__(self, weight: Weight, inputs: InputStatistics, selection: Selection) -> tuple[Weight, KeepMask]:
        """Choose and update, block by block."""
        return self.solve_together([weight], inputs, [selection])[0]

    def solve_together(
        self, weights: Sequence[OneWeight], inputs: InputStatistics, selections: Sequence[Selection]
    ) -> list[tuple[OneWeight, OneMask]]:
        """All rows at once, as those of one matrix: a column costs some small steps, however many rows it has."""
        factor = inputs.inverse_factor(self.dampening)
        scaled = factor / factor.diagonal()[:, None]
        # Columns are rows here: each is read and written as one piece of memory.
        columns = torch.cat([weight.to(factor.dtype).t() for weight in weights], dim=1)
        alive = (columns != 0) & (inputs.sums["gram"].diagonal() != 0)[:, None]
        columns.mul_(as_numbers(alive))
        gone = torch.empty_like(columns)  # 1 or 0: a product with booleans is many times as slow
        ends = list(accumulate(len(weight) for weight in weights))
        members = [slice(end - len(weight), end) for end, weight in zip(ends, weights, strict=True)]
        choices: list[_Choice] = []
        if self.mask == "upfront":
            for weight, rows, selection in zip(weights, members, selections, strict=True):
                gone[:, rows] = as_numbers(~(selection.keep(weight, inputs).t() & alive[:, rows]))
        else:
            choices = _choices(members, selections)
        whole = lcm(*(choice.group for choice in choices if choice.group))
        size, at_once = _multiple(self.block_size, whole), _multiple(_AT_ONCE, whole)
        for start in range(0, len(columns), size):
            stop = min(start + size, len(columns))
            here = slice(start, stop)
            block, errors = columns[here], torch.empty_like(columns[here])
            for choice in choices:
                if not choice.group:
                    choice(here, columns, alive, gone, inputs)
            for first in range(start, stop, at_once):
                last = min(first + at_once, stop)
                now = slice(first, last)
                steps = zip(columns[now].unbind(), gone[now].unbind(), scaled[now, now].unbind(), strict=True)
                for index, (column, pruned, row) in enumerate(steps):
                    for choice in choices:
                        if choice.group and index % choice.group == 0:
                            group = slice(first + index, first + index + choice.group)
                            choice(group, columns, alive, gone, inputs)
                    error = torch.mul(column, pruned, out=errors[first - start + index])
                    columns[first + index + 1 : last].addr_(row[index + 1 :], error, alpha=-1)
                _subtract(block[last - start :], scaled[now, last:stop], errors[first - start : last - start])
            _subtract(columns[stop:], scaled[here, stop:], errors)
        keep = gone == 0
        mask_(columns, keep)
        return [
            (
                columns[:, rows].t().to(weight.dtype, memory_format=torch.contiguous_format),
                keep[:, rows].t().contiguous(),
            )
            for weight, rows in zip(weights, members, strict=True)
        ]


@dataclass
class _Choice:
    """How the mask of some rows is chosen: N:M a group at a time, any other pattern a block at a time."""

    selection: Selection
    rows: slice
    group: int
    pruned: int = 0

    def __call__(self, here: slice, columns: Tensor, alive: Tensor, gone: Tensor, inputs: InputStatistics) -> None:
        """Choose in some columns, all before which are done."""
        lives = alive[here, self.rows]
        # Weights that were zero have taken up updates; a zero again, they score lowest.
        weight = columns[here, self.rows].mul(as_numbers(lives)).t().contiguous()
        share = self.selection.sparsity
        if not self.group:
            # What earlier blocks rounded down is made up for, so that whole rows have their exact number.
            share = max(0.0, (share * here.stop * len(weight) - self.pruned + 1e-6) / weight.numel())
        keep = replace(self.selection, sparsity=share).keep(weight, inputs.columns(here.start, here.stop)).t()
        pruned = gone[here, self.rows].copy_(as_numbers(~(keep & lives)))
        if not self.group:
            self.pruned += int(pruned.count_nonzero())


def _choices(members: Sequence[slice], selections: Sequence[Selection]) -> list[_Choice]:
    """One for each layer; layers with the same N:M, which looks at each row for itself, share one."""
    choices: list[_Choice] = []
    for rows, selection in zip(members, selections, strict=True):
        group = selection.pattern.m if isinstance(selection.pattern, NM) else 0
        if group and choices and choices[-1].selection == selection and not selection.criterion.spans_rows:
            choices[-1].rows = slice(choices[-1].rows.start, rows.stop)
        else:
            choices.append(_Choice(selection, rows, group))
    return choices


def _multiple(size: int, group: int) -> int:
    """About `size`, in whole groups."""
    return max(1, size // group) * group


def _subtract(columns: Tensor, factor: Tensor, errors: Tensor) -> None:
    if len(columns):
        columns.addmm_(factor.t(), errors, alpha=-1)
