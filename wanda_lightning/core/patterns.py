"""Patterns turn scores into the mask of what to keep.

Row-wise, layer-wise and N:M are three views of one primitive: see the scores as (groups, size) and keep the largest of
each group.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from wanda_lightning.core.types import Groups, KeepGroups, KeepMask, Score

_SMALL_GROUP = 16  # up to here, comparing all pairs beats a selection per group (measured on 4096 x 11008)
_FEW_GROUPS = 1024  # up to here a sort is faster than comparing (on a CPU; 512 groups of 4: two thirds of the time)
_LARGE_GROUP = 1 << 16  # from here on a sample comes first
_STRIDE = 61  # of the sample; a prime, as widths are not
_GROUPS_AT_ONCE = 1 << 16  # what the pairwise comparison holds at a time: it then stays in the cache


def keep_largest(scores: Groups, count: int) -> KeepGroups:
    """Keep the `count` largest scores of each group; among equal scores the later ones stay.

    Example:
        >>> keep_largest(torch.tensor([[3.0, 1.0, 2.0, 1.0]]), 2)
        tensor([[ True, False,  True, False]])
    """
    scores = scores.detach()
    size = scores.shape[1]
    assert 0 <= count <= size, f"cannot keep {count} of {size}"
    if count == size:
        return torch.ones_like(scores, dtype=torch.bool)
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if size <= _SMALL_GROUP:
        return _keep_by_order(scores, count) if len(scores) <= _FEW_GROUPS else _keep_by_rank(scores, count)
    return _keep_by_threshold(scores, count)


def _keep_by_order(scores: Groups, count: int) -> KeepGroups:
    pruned = scores.sort(dim=1, stable=True).indices[:, : scores.shape[1] - count]
    return torch.ones_like(scores, dtype=torch.bool).scatter_(1, pruned, False)


def _keep_by_rank(scores: Groups, count: int) -> KeepGroups:
    size = scores.shape[1]
    keep = torch.empty_like(scores, dtype=torch.bool)
    array: Callable[[Tensor], Any] = Tensor.numpy if _is_for_numpy(scores) else Tensor.detach
    for part, part_keep in zip(scores.split(_GROUPS_AT_ONCE), keep.split(_GROUPS_AT_ONCE), strict=True):
        columns = array(scores.new_empty(size, len(part)))
        columns[:] = array(part).T
        # How many others are smaller, or equal and before: at first, all that are before.
        rank = array(torch.arange(size, dtype=torch.int8, device=scores.device)[:, None].repeat(1, len(part)))
        for shift in range(1, size):
            later_is_smaller = (columns[shift:] < columns[:-shift]).view(rank.dtype)
            rank[:-shift] += later_is_smaller
            rank[shift:] -= later_is_smaller
        array(part_keep)[:] = (rank >= size - count).T
    return keep


def _keep_by_threshold(scores: Groups, count: int) -> KeepGroups:
    pruned = scores.shape[1] - count
    threshold, next_larger = _kth_smallest(scores, pruned)
    keep = scores > threshold
    tied = (threshold == next_larger).squeeze(1).nonzero().squeeze(1)
    if len(tied):
        some, level = scores[tied], threshold[tied]
        at_level = some == level
        missing = pruned - (some < level).sum(dim=1, keepdim=True)
        keep[tied] |= at_level & (at_level.cumsum(dim=1) > missing)
    return keep


def _kth_smallest(scores: Groups, k: int) -> tuple[Float[Tensor, "groups 1"], Float[Tensor, "groups 1"]]:
    """The k-th smallest of each group, and the one after it."""
    if not _is_for_numpy(scores):
        with _values_only():
            smaller, larger = (scores.kthvalue(rank, dim=1, keepdim=True).values for rank in (k, k + 1))
        return smaller, larger
    if scores.shape[1] >= _LARGE_GROUP:
        found = torch.tensor([_kth_of_many(group, k) for group in scores], dtype=scores.dtype, device=scores.device)
        return found[:, :1], found[:, 1:]
    values = scores.clone()
    values.numpy().partition(k - 1, axis=1)
    return values[:, k - 1 : k], values[:, k:].amin(dim=1, keepdim=True)


def _kth_of_many(scores: Float[Tensor, " size"], k: int) -> tuple[float, float]:
    """Of one large group: a sample tells between which two values to look, where few are."""
    array = scores.numpy()
    sample = array[::_STRIDE].copy()
    sample.sort()
    middle, margin = k / len(array) * len(sample), 2 * len(sample) ** 0.5  # at least four standard deviations
    low, high = sample[max(0, int(middle - margin))], sample[min(len(sample) - 1, int(middle + margin))]
    rank = k - int(torch.from_numpy(array < low).count_nonzero())
    values = array[(array >= low) & (array <= high)]
    if not 0 < rank < len(values):  # the sample is not like the whole
        rank, values = k, array.copy()
    values.partition(rank - 1)
    return float(values[rank - 1]), float(values[rank:].min())


def _is_for_numpy(scores: Groups) -> bool:
    """On a CPU it compares, transposes and selects 3 to 6 times as fast as PyTorch (measured on two cores)."""
    return scores.device.type == "cpu" and scores.dtype in (torch.float32, torch.float64)


@contextmanager
def _values_only() -> Iterator[None]:
    """Allow what PyTorch calls nondeterministic on CUDA for its indices or its speed; we read values only."""
    strict, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warns)


class Pattern(ABC):
    """Where zeros may fall, and how many."""

    @property
    def spans_rows(self) -> bool:
        """Whether what becomes of a row depends on other rows, so that no process can choose in its rows alone."""
        return False

    @property
    def fixed_sparsity(self) -> float | None:
        """The only sparsity that the pattern can have; None if it can have any."""
        return None

    def check(self, sparsity: float) -> None:  # noqa: B027  # most patterns can have any
        """Refuse a sparsity that the pattern cannot have.

        Raises:
            ValueError: If it cannot.
        """

    def why_not(self, d_in: int) -> str | None:
        """Why a layer with so many inputs cannot have the pattern; None where it can."""
        return None

    def sparsity_steps(self, d_out: int, d_in: int) -> int:
        """In how many equal steps the sparsity of a layer goes from 0 to 1."""
        return d_out * d_in

    def for_sparsity(self, sparsity: float) -> Pattern:
        """The pattern for one layer, where the layers differ in sparsity."""
        return self

    @abstractmethod
    def __call__(self, scores: Score, sparsity: float) -> KeepMask:
        """Choose what to keep; higher scores survive."""


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Any weight may go; exactly `int(size * sparsity)` of each comparison group do.

    Attributes:
        group: What is compared: each output row for itself (Wanda's choice), or all weights of the layer.
    """

    group: Literal["row", "layer"] = "row"

    def __post_init__(self) -> None:
        if self.group not in ("row", "layer"):
            raise ValueError(f"Unstructured compares within a 'row' or a 'layer', but group={self.group!r} was given")

    @property
    def spans_rows(self) -> bool:
        """Where weights of all rows are compared."""
        return self.group == "layer"

    def sparsity_steps(self, d_out: int, d_in: int) -> int:
        """One for each weight of a comparison group."""
        return d_in if self.group == "row" else d_out * d_in

    def __call__(self, scores: Score, sparsity: float) -> KeepMask:
        """Keep the largest of each group."""
        groups = scores if self.group == "row" else scores.reshape(1, -1)
        size = groups.shape[1]
        return keep_largest(groups, size - int(size * sparsity)).reshape(scores.shape)


@dataclass(frozen=True)
class NM(Pattern):
    """N weights survive in every M consecutive inputs of a row, as sparse tensor cores want it (2:4).

    Attributes:
        n: Survivors of each group.
        m: Size of a group.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 1 <= self.n < self.m:
            raise ValueError(f"N:M keeps N of every M weights with 1 <= N < M, but {self.n}:{self.m} was given")

    @property
    def sparsity(self) -> float:
        """`1 - n/m`."""
        return 1 - self.n / self.m

    @property
    def fixed_sparsity(self) -> float | None:
        """`1 - n/m`."""
        return self.sparsity

    def check(self, sparsity: float) -> None:
        """Refuse another sparsity than `1 - n/m`."""
        if abs(sparsity - self.sparsity) > 1e-6:
            raise ValueError(
                f"{self.n}:{self.m} has a sparsity of {self.sparsity:g}, but {sparsity:g} was asked for. "
                f"Use sparsity={self.sparsity:g}, or pattern='unstructured' for any sparsity."
            )

    def why_not(self, d_in: int) -> str | None:
        """A width that `m` does not divide; whatever `n` an allocation gives the layer.

        Example:
            >>> NM(2, 4).why_not(27)
            'input width 27 is not a multiple of 4'
        """
        return f"input width {d_in} is not a multiple of {self.m}" if d_in % self.m else None

    def sparsity_steps(self, d_out: int, d_in: int) -> int:
        """One for each member of a group."""
        return self.m

    def for_sparsity(self, sparsity: float) -> Pattern:
        """The nearest n of the same m, at least 1; where that is all of them, the layer stays dense.

        Example:
            >>> NM(4, 8).for_sparsity(0.65), NM(4, 8).for_sparsity(0.0)
            (NM(n=3, m=8), Unstructured(group='row'))
        """
        n = max(1, self.m - round(sparsity * self.m))
        return NM(n, self.m) if n < self.m else Unstructured()

    def __call__(self, scores: Score, sparsity: float) -> KeepMask:
        """Keep the `n` largest of every `m`."""
        return keep_largest(scores.reshape(-1, self.m), self.n).reshape(scores.shape)


@dataclass(frozen=True)
class EqualShare(Pattern):
    """Each row loses the same share of its total score, so rows differ in sparsity: the paper's "variant".

    A row is cut where the running sum of its sorted scores reaches `share` of the row's total; one share for the
    matrix is found by bisection from 0.4 in [0, 0.8], until the sparsity is within 0.001 of the target or the bracket
    is narrower than 0.001 (Sun et al. 2024, `--use_variant`). A share of 0.8 may fall short of a high sparsity.
    """

    @property
    def spans_rows(self) -> bool:
        """Always: the share is one for all rows."""
        return True

    def __call__(self, scores: Score, sparsity: float) -> KeepMask:
        """Find the share and keep what lies above each row's cut."""
        tolerance = 0.001
        if sparsity == 0:
            return torch.ones_like(scores, dtype=torch.bool)
        if abs((scores == 0).float().mean().item() - sparsity) <= tolerance:
            return scores > 0  # already there: pruning twice changes nothing
        ascending = scores.sort(dim=1).values
        with _values_only():
            running = ascending.cumsum(dim=1)
        total = scores.sum(dim=1, keepdim=True)
        low, share, high = 0.0, 0.4, 0.8
        while True:
            cut = (running <= total * share).sum(dim=1, keepdim=True) - 1
            level = ascending.gather(1, cut.clamp(min=0)).masked_fill(cut < 0, -1.0)
            keep = scores > level
            reached = 1 - keep.float().mean().item()
            if abs(reached - sparsity) <= tolerance or high - low < tolerance:
                return keep
            if reached > sparsity:
                share, high = (share + low) / 2, share
            else:
                share, low = (share + high) / 2, share


PATTERNS: dict[str, Pattern] = {
    "unstructured": Unstructured(),
    "unstructured_layer": Unstructured(group="layer"),
    "equal_share": EqualShare(),
    "2:4": NM(2, 4),
    "4:8": NM(4, 8),
}


def pattern_named(name: str) -> Pattern:
    """The pattern of a name in `PATTERNS`, or any `N:M`.

    Example:
        >>> pattern_named("1:4")
        NM(n=1, m=4)

    Raises:
        ValueError: If there is none of that name.
    """
    if name in PATTERNS:
        return PATTERNS[name]
    if match := re.fullmatch(r"(\d+):(\d+)", name):
        return NM(int(match[1]), int(match[2]))
    raise ValueError(f"no pattern is called {name!r}: use one of {', '.join(PATTERNS)}, or any N:M such as 1:4")
