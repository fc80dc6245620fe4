"""Choose and fit together: what is kept is found by alternating between the best fit and the best mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from wanda_lightning.core.criteria import Criterion, Wanda
from wanda_lightning.core.patterns import Pattern
from wanda_lightning.core.solvers.base import Solver
from wanda_lightning.core.solvers.refit import refitted
from wanda_lightning.core.statistics import InputStatistics
from wanda_lightning.core.types import KeepMask, Weight


@dataclass(frozen=True)
class ADMM(Solver):
    """Find mask and weights that together come nearest to the dense layer's outputs.

    The alternating direction method of multipliers on `||(w - w') X^T||^2`, in the manner of ALPS (Meng et al. 2024): a
    fit without a mask, pulled towards a masked copy, by turns with the masking of that fit; the pull `rho` grows
    until both agree. Inputs are scaled to norm 1, where magnitude is Wanda's score; so this is Wanda with the weights
    that are kept already making up for those that go. A least-squares refit on the mask that was found ends it.

    It brings its own criterion. Weights that are zero before stay so.

    Attributes:
        dampening: As in `Refit`.
        steps: Turns.
        rho: The pull in the first turn, in units of the diagonal.
        growth: Its factor from turn to turn.
        refit_steps: Of conjugate gradients at the end.
    """

    dampening: float = 0.1
    steps: int = 20
    rho: float = 0.1
    growth: float = 1.2
    refit_steps: int = 15

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    takes_any_criterion: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not (self.dampening > 0 and self.rho > 0 and self.growth >= 1 and self.steps >= 1 and self.refit_steps >= 1):
            raise ValueError(
                f"ADMM needs dampening and rho > 0, growth >= 1, steps and refit_steps >= 1, but got {self}"
            )

    def __call__(
        self,
        weight: Weight,
        inputs: InputStatistics | None,
        criterion: Criterion,
        pattern: Pattern,
        sparsity: float,
    ) -> tuple[Weight, KeepMask]:
        """Alternate, then fit."""
        assert inputs is not None, "ADMM reads the inputs"
        scale, gram, values, vectors = inputs.scaled_eigen(self.dampening)
        alive = weight != 0
        dense = weight.to(gram.dtype).contiguous() * scale
        target = torch.mm(dense, gram)
        keep = pattern(dense.abs(), sparsity)
        masked, dual, rho = dense * keep, torch.zeros_like(dense), self.rho
        for _ in range(self.steps):
            pulled = torch.addcmul(target - dual, masked, torch.tensor(rho, dtype=gram.dtype))
            free = torch.mm(torch.mm(pulled, vectors).div_(values + rho), vectors.t())
            wanted = torch.add(free, dual, alpha=1 / rho).mul_(alive)
            keep = pattern(wanted.abs(), sparsity)
            masked = wanted.mul_(keep)
            dual.add_(free.sub_(masked), alpha=rho)
            rho *= self.growth
        keep &= alive
        fitted = refitted(dense, masked, keep, gram, self.refit_steps)
        return fitted.div_(scale).masked_fill_(~keep, 0).to(weight.dtype), keep

    @property
    def own_criterion(self) -> Criterion:
        """Wanda's score, of the fitted weights."""
        return Wanda()
