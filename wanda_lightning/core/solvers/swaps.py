"""Exchange kept and pruned weights as long as that brings the outputs nearer to the dense ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from wanda_lightning.core.criteria import Criterion
from wanda_lightning.core.patterns import NM, Pattern
from wanda_lightning.core.solvers.base import Solver, only
from wanda_lightning.core.statistics import InputStatistics
from wanda_lightning.core.types import Gram, KeepMask, Weight

_ROWS_AT_ONCE = 256  # whose scratch of a few times their size then stays in the cache
_NEGLIGIBLE = 1e-6  # of a row's error: what rounding could feign

FindPair = Callable[[Tensor, Tensor, Tensor, Gram], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class SparseSwaps(Solver):
    """Choose as `ZeroOut` does, then exchange one kept for one pruned weight of a row, again and again.

    With `e` what a row has lost and `G = X^T X`, its error is `e G e`. Pruning p and bringing back q changes it by
    `w_p² G_pp + 2 w_p (G e)_p + w_q² G_qq - 2 w_q (G e)_q - 2 w_p w_q G_pq`; the exchange that lowers it most is made
    (SparseSwaps, Zimmer et al. 2025, arXiv 2512.10922). With N:M both are of one group. Each row, and each group, has
    as many zeros as before, and the kept weights keep their values. Weights that are zero before stay so.

    Attributes:
        swaps: In each row, at the most; a row without one that helps ends earlier.
        candidates: How many of those that alone would be best to prune, and to bring back, are tried with each other;
            with as many as there are inputs the exchange is the best of all, as in the paper. With N:M it always is.
    """

    swaps: int = 25
    candidates: int = 8

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})

    def __post_init__(self) -> None:
        if self.swaps < 1 or self.candidates < 1:
            raise ValueError(f"SparseSwaps needs swaps and candidates >= 1, but got {self}")

    def __call__(
        self,
        weight: Weight,
        inputs: InputStatistics | None,
        criterion: Criterion,
        pattern: Pattern,
        sparsity: float,
    ) -> tuple[Weight, KeepMask]:
        """Choose, exchange, zero."""
        assert inputs is not None, "SparseSwaps reads the inputs"
        gram = inputs.sums["gram"]
        keep = pattern(criterion(weight, inputs), sparsity).contiguous()
        find_pair = _within_groups(pattern.m) if isinstance(pattern, NM) else _among_best(self.candidates)
        for rows, rows_keep in zip(weight.split(_ROWS_AT_ONCE), keep.split(_ROWS_AT_ONCE), strict=True):
            _exchange(rows.to(gram.dtype).contiguous(), rows_keep, gram, find_pair, self.swaps)
        return only(weight, keep), keep


def _exchange(weight: Weight, keep: KeepMask, gram: Gram, find_pair: FindPair, swaps: int) -> None:
    """Exchange in `keep`, in place, in each row until nothing helps."""
    lost = only(weight, ~keep)
    pull = torch.mm(lost, gram)
    negligible = _NEGLIGIBLE * (lost * pull).sum(dim=1)
    square, dead = weight.square() * gram.diagonal(), weight == 0
    for _ in range(swaps):
        cross = 2 * weight * pull
        prune = torch.add(square, cross).masked_fill_(~keep | dead, torch.inf)
        bring_back = torch.sub(square, cross).masked_fill_(keep | dead, torch.inf)
        change, p, q = find_pair(prune, bring_back, weight, gram)
        rows = (change < -negligible).nonzero().squeeze(1)
        if not len(rows):
            break
        p, q = p[rows], q[rows]
        keep[rows, p], keep[rows, q] = False, True
        pull[rows] += weight[rows, p, None] * gram[p] - weight[rows, q, None] * gram[q]


def _among_best(candidates: int) -> FindPair:
    """The best pair of those that are best alone."""

    def find(prune: Tensor, bring_back: Tensor, weight: Weight, gram: Gram) -> tuple[Tensor, Tensor, Tensor]:
        count = min(candidates, weight.shape[1])
        first, p = prune.topk(count, largest=False)
        second, q = bring_back.topk(count, largest=False)
        both = (
            weight.gather(1, p).unsqueeze(2) * weight.gather(1, q).unsqueeze(1) * gram[p.unsqueeze(2), q.unsqueeze(1)]
        )
        change, pair = (first.unsqueeze(2) + second.unsqueeze(1) - 2 * both).flatten(1).min(dim=1, keepdim=True)
        return change.squeeze(1), p.gather(1, pair // count).squeeze(1), q.gather(1, pair % count).squeeze(1)

    return find


def _within_groups(size: int) -> FindPair:
    """The best pair within one group, of all groups of a row."""

    def find(prune: Tensor, bring_back: Tensor, weight: Weight, gram: Gram) -> tuple[Tensor, Tensor, Tensor]:
        groups = weight.unflatten(1, (-1, size))
        blocks = gram.unflatten(0, (-1, size)).unflatten(2, (-1, size)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        both = groups.unsqueeze(3) * groups.unsqueeze(2) * blocks
        alone = prune.unflatten(1, (-1, size)).unsqueeze(3) + bring_back.unflatten(1, (-1, size)).unsqueeze(2)
        change, pair = (alone - 2 * both).flatten(1).min(dim=1)
        row_of_pair = pair // size  # of all pairs, p changes from row to row, q within a row
        return change, row_of_pair, row_of_pair // size * size + pair % size

    return find
