"""Choose and fit together: what is kept is found by alternating between the best fit and the best mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from wanda_lightning.core.criteria import Criterion, Wanda, with_inactive
from wanda_lightning.core.patterns import Pattern
from wanda_lightning.core.solvers.base import Solver
from wanda_lightning.core.solvers.refit import refitted
from wanda_lightning.core.statistics import InputStatistics
from wanda_lightning.core.types import Gram, KeepMask, Weight


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
        turns: A fit and a masking each.
        rho: The pull in the first turn and in the last, in units of the diagonal; in between it grows by one factor.
        refit_steps: Of conjugate gradients at the end.
    """

    dampening: float = 0.05
    turns: int = 10
    rho: tuple[float, float] = (0.1, 0.8)
    refit_steps: int = 2

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    takes_any_criterion: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "rho", tuple(self.rho))  # a list, from YAML
        counts = (self.turns, self.refit_steps)
        if not self.dampening > 0 or min(counts) < 1 or len(self.rho) != 2 or not 0 < self.rho[0] <= self.rho[1]:
            raise ValueError(
                "ADMM needs dampening > 0, turns and refit_steps >= 1, and rho=(first, last) above 0 that does not "
                f"fall, but got {self}"
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
        energy = inputs.sums["gram"].diagonal()
        keep = wanda = pattern(with_inactive(dense.abs(), weight, energy), sparsity)
        # Masked copy and dual variable are one tensor with the mask: `wanted` where it keeps and where it does not.
        wanted, dropped = dense.clone(), torch.zeros_like(dense)
        pull = dense * keep  # masked copy minus dual variable
        rho, last = self.rho
        growth = (last / rho) ** (1 / max(1, self.turns - 1))
        for _ in range(self.turns):
            in_eigenbasis = torch.mm(torch.add(target, pull, alpha=rho, out=pull), vectors).div_(values + rho)
            free = torch.mm(in_eigenbasis, vectors.t(), out=pull)
            torch.addcmul(free, wanted, dropped, value=1 / growth, out=wanted)  # the dual, in units of rho
            keep = pattern(with_inactive(wanted.abs().mul_(alive), weight, energy), sparsity) & alive
            torch.sub(1, keep.to(wanted.dtype), out=dropped)
            torch.addcmul(wanted, wanted, dropped, value=-1 - 1 / growth, out=pull)
            rho *= growth
        masked = wanted.mul_(keep)
        fitted = refitted(dense, masked, keep, gram, self.refit_steps)
        raw = inputs.sums["gram"]
        if _error((fitted - dense) / scale, raw) > _error(dense * ~wanda / scale, raw):  # inputs hardly correlate
            keep = wanda & alive
            fitted = refitted(dense, dense * keep, keep, gram, self.refit_steps)
        return fitted.div_(scale).masked_fill_(~keep, 0).to(weight.dtype), keep

    @property
    def own_criterion(self) -> Criterion:
        """Wanda's score, of the fitted weights."""
        return Wanda()


def _error(difference: Weight, gram: Gram) -> float:
    """What it does to the outputs, squared."""
    return float((torch.mm(difference, gram) * difference).sum())
