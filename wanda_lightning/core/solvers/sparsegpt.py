"""Choose column block by column block, and let the columns behind make up for what is lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from wanda_lightning.core.criteria import Criterion, Saliency
from wanda_lightning.core.patterns import NM, Pattern
from wanda_lightning.core.solvers.base import Solver
from wanda_lightning.core.statistics import InputStatistics
from wanda_lightning.core.types import KeepMask, Weight

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
        choose: In each block, from the updated weights; or everything `"before"` the first update.
    """

    dampening: float = 0.01
    block_size: int = 128
    choose: Literal["block", "before"] = "block"

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})

    def __post_init__(self) -> None:
        if not self.dampening > 0 or self.block_size < 1 or self.choose not in ("block", "before"):
            raise ValueError(
                f"SparseGPT needs dampening > 0, block_size >= 1 and choose='block' or 'before', but got {self}"
            )

    @property
    def own_criterion(self) -> Criterion:
        """What the update cannot make up for."""
        return Saliency(self.dampening)

    def __call__(
        self,
        weight: Weight,
        inputs: InputStatistics | None,
        criterion: Criterion,
        pattern: Pattern,
        sparsity: float,
    ) -> tuple[Weight, KeepMask]:
        """Choose and update, block by block."""
        assert inputs is not None, "SparseGPT reads the inputs"
        factor = inputs.inverse_factor(self.dampening)
        alive = (weight != 0) & (inputs.sums["gram"].diagonal() != 0)
        # Columns are rows here: each is read and written as one piece of memory.
        columns = weight.to(factor.dtype).t().contiguous().mul_(alive.t())
        keep = torch.empty_like(columns, dtype=torch.bool)
        if self.choose == "before":
            keep.copy_((pattern(criterion(weight, inputs), sparsity) & alive).t())
        group = pattern.m if isinstance(pattern, NM) and self.choose == "block" else 0
        size, at_once = (_multiple(self.block_size, group), _multiple(_AT_ONCE, group))
        rows, pruned = len(weight), 0
        for start in range(0, len(columns), size):
            stop = min(start + size, len(columns))
            here = slice(start, stop)
            block, block_keep = columns[here], keep[here]
            if self.choose == "block" and not group:
                # What earlier blocks rounded down is made up for, so that whole rows have their exact number.
                share = (sparsity * stop * rows - pruned + 1e-6) / (block.shape[0] * rows)
                block_keep.copy_(_chosen(criterion, pattern, share, block, alive[:, here], inputs.columns(start, stop)))
                pruned += int((~block_keep).sum())
            errors = torch.empty_like(block)
            for first in range(0, len(block), at_once):
                last = min(first + at_once, len(block))
                for index in range(first, last):
                    if group and index % group == 0:
                        end = index + group
                        now, of = block[index:end], inputs.columns(start + index, start + end)
                        lives = alive[:, start + index : start + end]
                        block_keep[index:end] = _chosen(criterion, pattern, sparsity, now, lives, of)
                    position = start + index
                    error = torch.mul(block[index], ~block_keep[index], out=errors[index])
                    error.div_(factor[position, position])
                    block[index + 1 : last].addr_(factor[position, position + 1 : start + last], error, alpha=-1)
                _subtract(block[last:], factor[start + first : start + last, start + last : stop], errors[first:last])
            _subtract(columns[stop:], factor[here, stop:], errors)
        columns.masked_fill_(~keep, 0)
        return columns.t().to(weight.dtype, memory_format=torch.contiguous_format), keep.t().contiguous()


def _multiple(size: int, group: int) -> int:
    """About `size`, in whole groups."""
    return max(1, size // group) * group if group else size


def _chosen(
    criterion: Criterion, pattern: Pattern, sparsity: float, columns: Tensor, alive: Tensor, inputs: InputStatistics
) -> Tensor:
    """What to keep of some columns, as (columns, rows)."""
    # Weights that were zero have taken up updates; a zero again, they score lowest.
    weight = columns.t().contiguous().mul_(alive)
    return (pattern(criterion(weight, inputs), sparsity) & alive).t()


def _subtract(columns: Tensor, factor: Tensor, errors: Tensor) -> None:
    if len(columns):
        columns.addmm_(factor.t(), errors, alpha=-1)
