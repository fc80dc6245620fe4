"""Choose and fit together: what is kept is found by alternating between the best fit and the best mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from wanda_lightning.core.criteria import Criterion, Wanda, with_inactive
from wanda_lightning.core.gram import cholesky
from wanda_lightning.core.hyperparameters import Number, check
from wanda_lightning.core.selection import Selection
from wanda_lightning.core.solvers.base import Solver, as_numbers, masked
from wanda_lightning.core.solvers.refit import refitted
from wanda_lightning.core.statistics import InputStatistics
from wanda_lightning.core.types import Gram, KeepMask, Score, Weight

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
        object.__setattr__(self, "rho", tuple(self.rho))  # a file gives a list
        at_least_1 = Number(minimum=1, whole=True)
        check(self, dampening=Number(above=0), iterations=at_least_1, refit_steps=at_least_1)
        if (
            len(self.rho) != 2
            or not all(map(Number(minimum=_LEAST_RHO).accepts, self.rho))
            or self.rho[0] > self.rho[1]
        ):
            raise ValueError(
                f"rho of ADMM must be two numbers of at least {_LEAST_RHO}, the first and a last that is not smaller, "
                f"but it is {self.rho}."
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

        wanted, keep = self._alternate(dense, gram, choose)
        fitted, error = refitted(dense, masked(wanted, keep), keep, gram, self.refit_steps)
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

    def _alternate(self, dense: Weight, gram: Gram, choose: Callable[[Score], KeepMask]) -> tuple[Weight, KeepMask]:
        """Alternate between the fit and the mask.

        Returns:
            The last fit plus the dual variable, to be masked, and the mask.
        """
        rho, last = self.rho
        growth = (last / rho) ** (1 / max(1, self.iterations - 1))
        target, pulled = torch.mm(dense, gram), torch.empty_like(dense)
        keep = choose(dense.abs())
        # The sum is the masked copy where it is kept, and the dual variable, in units of rho, where it is dropped.
        total, dual = masked(dense, keep), torch.zeros_like(dense)
        for _ in range(self.iterations):
            lower, used = cholesky(gram, rho)
            ratio = growth * (used / rho)  # of this iteration's rho to the previous one
            # The fit is pulled toward the masked copy minus the dual variable.
            torch.add(target, total, alpha=used, out=pulled).add_(dual, alpha=-used * (1 + 1 / ratio))
            fit = torch.linalg.solve_triangular(lower.t(), pulled, upper=True, left=False)
            fit = torch.linalg.solve_triangular(lower, fit, upper=False, left=False)
            total = fit.add_(dual, alpha=1 / ratio)
            keep = choose(torch.abs(total, out=pulled))
            dual = masked(total, ~keep)
            rho = used * growth
        return total, keep

    @property
    def own_criterion(self) -> Criterion:
        """Wanda's score, of the fitted weights."""
        return Wanda()
