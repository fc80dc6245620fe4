"""Permutations of a layer's inputs, so that groups of N:M keep larger scores."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from wanda_lightning.common.checks import COUNT, check
from wanda_lightning.common.float64 import widest
from wanda_lightning.core.keep_largest import nondeterministic_kernels
from wanda_lightning.core.patterns import Pattern
from wanda_lightning.core.types import Order, Score

_CHUNK = 512  # groups in one assignment problem: time and memory grow with its square


class Permutation:
    """Permutes the inputs of layers before they are pruned. The base class permutes nothing."""

    needs: ClassVar[frozenset[str]] = frozenset()
    reads_batches: ClassVar[bool] = False  # whether it runs the calibration batches

    def why_not(self, pattern: Pattern) -> str | None:
        """Return why it cannot be combined with a pattern, and what to do; None if it can be."""
        return None

    def __call__(self, scores: Score, pattern: Pattern) -> Order:
        """Return the indices of the columns in their new order."""
        return torch.arange(scores.shape[1])


@dataclass(frozen=True)
class NoPermutation(Permutation):
    """Leave the inputs in their order."""


@dataclass(frozen=True)
class Assignment(Permutation):
    """Permute the inputs so that groups of N:M keep the largest total of Wanda's scores, by repeated assignment.

    Columns are dealt to the groups in the order of their total score. Each iteration then takes a random column out of
    every group and assigns these columns to the groups anew, in the best way. The value of a column in a group is what
    it adds to the scores that the group keeps, summed over the rows: `relu(x - t)` for the score x of the column and
    the nth largest score t of the other columns. The total does not decrease. RIA (Zhang et al. 2024) proposed linear
    assignment for N:M, in M rounds.

    Attributes:
        iterations: Number of assignments.
    """

    reads_batches = True
    iterations: int = 8

    def __post_init__(self) -> None:
        check(self, iterations=COUNT)

    def why_not(self, pattern: Pattern) -> str | None:
        """Return the reason if the pattern has no groups of consecutive inputs."""
        if pattern.group_size:
            return None
        return (
            "this pattern does not depend on the order of the inputs. Leave the permutation out, "
            "or use an N:M pattern."
        )

    def __call__(self, scores: Score, pattern: Pattern) -> Order:
        """Return the order; the original one if none is better."""
        scores = scores.float()
        # Stable: of equal totals the first column comes first, so equal inputs give equal orders.
        by_total = scores.sum(dim=0).argsort(descending=True, stable=True)
        members = by_total.reshape(pattern.group_size, -1).T.contiguous()  # a row for each group

        generator = torch.Generator().manual_seed(0)
        for _ in range(self.iterations):
            shuffled = torch.randperm(len(members), generator=generator)
            for chunk in shuffled.to(scores.device).split(_CHUNK):
                members[chunk] = _reassigned(scores, members[chunk], pattern.group_kept, generator)

        original = torch.arange(scores.shape[1], device=scores.device)
        orders = (original, members.flatten())  # the first one of equal scores
        return max(orders, key=lambda order: kept_score(scores, order, pattern))


def kept_score(scores: Score, order: Order, pattern: Pattern) -> float:
    """Return the sum of the scores that the pattern keeps after the columns are put in this order."""
    permuted = scores[:, order.to(scores.device)].float()
    groups = permuted.unflatten(1, (-1, pattern.group_size))
    kept = groups.topk(pattern.group_kept, dim=2).values
    return float(widest(kept).sum())


def _reassigned(scores: Score, members: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Take a random member out of each group, and assign these members to the groups in the best way."""
    from scipy.optimize import linear_sum_assignment

    groups, m = members.shape
    positions = torch.randint(m, (groups, 1), generator=generator).to(members.device)
    stays = torch.ones_like(members, dtype=torch.bool).scatter_(1, positions, False)

    # What a column must exceed in a row of a group to be kept there: the nth largest of the m - 1 others.
    others = scores[:, members[stays]].unflatten(1, (groups, m - 1))
    with nondeterministic_kernels():
        thresholds = others.kthvalue(m - n, dim=2).values.T.contiguous()

    # The sum of relu(x - t) over the rows is half of the sum of |x - t| + (x - t).
    freed = members.gather(1, positions).squeeze(1)
    columns = scores.T[freed].contiguous()
    gains = torch.cdist(columns, thresholds, p=1)
    gains += columns.sum(dim=1, keepdim=True)
    gains -= thresholds.sum(dim=1)

    column, group = linear_sum_assignment(gains.cpu().numpy(), maximize=True)
    reassigned = members.clone()
    target = torch.as_tensor(group, device=members.device)
    source = torch.as_tensor(column, device=members.device)
    reassigned[target, positions[target, 0]] = freed[source]
    return reassigned
