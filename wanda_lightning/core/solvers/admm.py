"""Choose and fit together: what is kept is found by alternating between the best fit and the best mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from wanda_lightning.core.criteria import Criterion, Wanda, with_inactive
from wanda_lightning.core.gram import cholesky
from wanda_lightning.core.selection import Selection
from wanda_lightning.core.solvers.base import Solver, as_numbers, masked
from wanda_lightning.core.solvers.refit import refitted
from wanda_lightning.core.statistics import InputStatistics
from wanda_lightning.core.types import KeepMask, Score, Weight

_LEAST_RHO = 0.001  # with less, rounding may leave a Gram matrix without a Cholesky factor


@dataclass(frozen=True)
class ADMM(Solver):
    """Find mask and weights that together come nearest to the dense layer's outputs.

    The alternating direction method of multipliers on `||(w - w') X^T||^2`, in the manner of ALPS (Meng et al. 2024): a
    fit without a mask, pulled towards a masked copy, by turns with the masking of that fit; the pull grows until both
    agree. Inputs are scaled to norm 1, where magnitude is Wanda's score; so this is Wanda with the weights that are
    kept already making up for those that go. A least-squares refit on the mask that was found ends it.

    It brings its own criterion. Weights that are zero before stay so.

    Attributes:
        dampening: As in `Refit`.
        iterations: A fit and a masking each.
        rho: The pull in the first turn and in the last, in units of the diagonal; in between it grows by one factor.
        refit_steps: Of conjugate gradients at the end.
    """

    dampening: float = 0.05
    iterations: int = 10
    rho: tuple[float, float] = (0.1, 0.8)
    refit_steps: int = 2

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    takes_any_criterion: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "rho", tuple(self.rho))  # a list, from YAML
        counts = (self.iterations, self.refit_steps)
        if (
            not self.dampening > 0
            or min(counts) < 1
            or len(self.rho) != 2
            or not _LEAST_RHO <= self.rho[0] <= self.rho[1]
        ):
            raise ValueError(
                f"ADMM needs dampening > 0, turns and refit_steps >= 1, and rho=(first, last) from {_LEAST_RHO} on "
                f"that does not fall, but got {self}"
            )

    def __call__(self, weight: Weight, inputs: InputStatistics, selection: Selection) -> tuple[Weight, KeepMask]:
        """Alternate, then fit."""
        scale, gram = inputs.scaled_gram(self.dampening)
        energy = inputs.sums["gram"].diagonal()
        alive = weight != 0
        dense = weight.to(gram.dtype).contiguous() * scale

        def choose(scores: Score) -> KeepMask:
            scores = with_inactive(scores.mul_(as_numbers(alive)), weight, energy)
            return selection.pattern(scores, selection.sparsity) & alive

        target = torch.mm(dense, gram)
        # `wanted` is masked copy plus dual variable: one where it is kept, the other where it is dropped.
        keep, dropped = choose(dense.abs()), torch.zeros_like(dense)
        rho, last = self.rho
        pull = torch.add(target, masked(dense, keep), alpha=rho)
        growth = (last / rho) ** (1 / max(1, self.iterations - 1))
        for _ in range(self.iterations):
            lower = cholesky(gram, rho)
            free = torch.linalg.solve_triangular(lower.t(), pull, upper=True, left=False)
            free = torch.linalg.solve_triangular(lower, free, upper=False, left=False)
            wanted = free.add_(dropped, alpha=1 / growth)  # the dual, in units of rho
            keep = choose(torch.abs(wanted, out=pull))
            dropped = masked(wanted, ~keep)
            rho *= growth
            # Masked copy minus dual variable, of the next turn.
            torch.add(target, wanted, alpha=rho, out=pull).add_(dropped, alpha=-rho * (1 + 1 / growth))
        fitted, error = refitted(dense, wanted.sub_(dropped), keep, gram, self.refit_steps)
        wanda = choose(dense.abs().mul_(energy.sqrt() / scale))
        lost = masked(dense, ~wanda)
        wanda_error = (torch.mm(lost, gram) * lost).sum()
        # As the inputs are, without the dampening.
        dampened_share = 1 - energy / scale.square()
        error = error.sum() - ((fitted - dense).square_() @ dampened_share).sum()
        wanda_error -= (lost.square_() @ dampened_share).sum()
        if error > wanda_error:  # inputs hardly correlate
            keep = wanda
            fitted, _ = refitted(dense, masked(dense, keep), keep, gram, self.refit_steps)
        return masked(fitted.div_(scale), keep).to(weight.dtype), keep

    @property
    def own_criterion(self) -> Criterion:
        """Wanda's score, of the fitted weights."""
        return Wanda()
