"""Alternate between the best fit and the best mask, so that both are found together."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from wanda_lightning.common.checks import COUNT, Number, check
from wanda_lightning.common.errors import UserError
from wanda_lightning.core.criteria import lower_inactive
from wanda_lightning.core.masking import as_numbers, masked
from wanda_lightning.core.selection import Selection
from wanda_lightning.core.solvers.refit import refit
from wanda_lightning.core.solvers.solver import Solver
from wanda_lightning.core.statistics import InputStatistics, cholesky
from wanda_lightning.core.types import Gram, KeepMask, Score, Solved, Weight

_MIN_RHO = 0.001  # below, rounding may leave a Gram matrix without a Cholesky factor


@dataclass(frozen=True)
class ADMM(Solver):
    """Find the mask and the weights that together come nearest to the dense layer's outputs.

    The alternating direction method of multipliers on `||(w - w') X^T||^2`, similar to ALPS (Meng et al. 2024): it
    alternates between a fit without a mask, pulled toward a masked copy, and masking that fit; the pull grows until
    both agree. A least-squares refit with the final mask follows. Inputs are scaled to norm 1, where magnitude equals
    Wanda's score, so the method is Wanda on weights that already compensate for the pruned ones. If the mask that
    Wanda's score selects on the dense weights has a smaller error, it is used instead.

    With a bias, X holds the inputs minus their means, also in Wanda's score, and the bias makes up for the difference
    of the means. This can only lower the least error that a mask allows, but the search may end with another mask.

    The solver takes no other criterion. Weights that are zero stay zero.

    Attributes:
        dampening: Pull toward the dense weights, as a fraction of the mean diagonal.
        iterations: Number of fits, each followed by a masking.
        rho: Pull toward the masked copy in the first and in the last iteration, in units of the diagonal; in between it
            grows by a constant factor.
        refit_steps: Maximum number of conjugate gradient steps of the refit.
        intercept: Fit the bias of a layer, if it has one, together with its weights.
    """

    needs = frozenset({"gram", "sum"})
    takes_any_criterion = False
    dampening: float = 0.05
    iterations: int = 10
    rho: tuple[float, float] = (0.1, 0.8)
    refit_steps: int = 2
    intercept: bool = True

    def __post_init__(self) -> None:
        check(self, dampening=Number(above=0), intercept=(True, False))
        check(self, iterations=COUNT, refit_steps=COUNT)
        if isinstance(self.rho, list):  # as a file gives it
            object.__setattr__(self, "rho", tuple(self.rho))
        is_pair = isinstance(self.rho, tuple) and len(self.rho) == 2
        in_range = is_pair and all(rho in Number(minimum=_MIN_RHO) for rho in self.rho)
        if not in_range or self.rho[0] > self.rho[1]:
            raise UserError(
                f"rho of ADMM must be two numbers of at least {_MIN_RHO}, the first and a last that is not smaller, "
                f"but it is {self.rho}."
            )

    def __call__(self, weight: Weight, inputs: InputStatistics, selection: Selection) -> Solved:
        """Alternate, then refit."""
        # In these units, an input has norm 1 and the dense weight is `weight * scale`.
        scale, gram = inputs.scaled_gram(self.dampening)
        dense = weight.to(gram.dtype).contiguous() * scale
        energy = inputs.sums["gram"].diagonal()
        alive = weight != 0

        def choose(scores: Score) -> KeepMask:
            scores = lower_inactive(scores.mul_(as_numbers(alive)), weight, energy)
            return selection.choose(scores) & alive

        total, keep = self._alternate(dense, gram, choose)
        fitted, error = refit(dense, masked(total, keep), keep, gram, self.refit_steps)

        wanda_keep = choose(dense.abs().mul_(energy.sqrt() / scale))
        lost = masked(dense, ~wanda_keep)
        wanda_error = (torch.mm(lost, gram) * lost).sum(dim=1)

        # The errors are compared without the dampening, which is this fraction of each input's diagonal.
        dampened = 1 - energy / scale.square()
        admm_error = error.squeeze(1) - (fitted - dense).square_() @ dampened
        wanda_error -= lost.square_() @ dampened

        # Wanda's mask may be better where the inputs hardly correlate.
        if selection.total_error(admm_error) > selection.total_error(wanda_error):
            keep = wanda_keep
            fitted, _ = refit(dense, masked(dense, keep), keep, gram, self.refit_steps)
        return masked(fitted.div_(scale), keep).to(weight.dtype), keep

    def _alternate(self, dense: Weight, gram: Gram, choose: Callable[[Score], KeepMask]) -> Solved:
        """Return the last fit plus the dual variable, not masked, and the mask.

        The dual variable is stored divided by the rho of the iteration that computed it. `total` is the masked copy
        where `keep` is True, and the dual variable where it is False.
        """
        rho, last_rho = self.rho
        growth = (last_rho / rho) ** (1 / max(1, self.iterations - 1))
        target = torch.mm(dense, gram)
        pulled = torch.empty_like(dense)
        keep = choose(dense.abs())
        total = masked(dense, keep)
        dual = torch.zeros_like(dense)
        for _ in range(self.iterations):
            # A factorization that fails is repeated with a larger rho, which all of this iteration must use.
            lower, used_rho = cholesky(gram, rho)
            ratio = growth * (used_rho / rho)  # to the rho of the previous iteration

            # The fit is pulled toward the masked copy minus the dual variable; `total` holds their sum.
            torch.add(target, total, alpha=used_rho, out=pulled)
            pulled.add_(dual, alpha=-used_rho * (1 + 1 / ratio))
            fit = torch.linalg.solve_triangular(lower.t(), pulled, upper=True, left=False)
            torch.linalg.solve_triangular(lower, fit, upper=False, left=False, out=fit)
            del lower  # or two factors would be in memory at once

            total = fit.add_(dual, alpha=1 / ratio)
            keep = choose(torch.abs(total, out=pulled))
            dual = masked(total, ~keep)
            rho = used_rho * growth
        return total, keep
