"""Choose and fit together: what is kept is found by alternating between the best fit and the best mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from wanda_lightning.core.criteria import Criterion, Wanda
from wanda_lightning.core.gram import inverse, scaled
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
        rounds: Values of the pull, each of which costs a factorisation.
        turns: In each round.
        rho: The pull in the first round and in the last, in units of the diagonal; in between it grows by one factor.
        refit_steps: Of conjugate gradients at the end.
    """

    dampening: float = 0.1
    rounds: int = 6
    turns: int = 2
    rho: tuple[float, float] = (0.1, 0.8)
    refit_steps: int = 4

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    takes_any_criterion: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "rho", tuple(self.rho))  # a list, from YAML
        counts = (self.rounds, self.turns, self.refit_steps)
        if not self.dampening > 0 or min(counts) < 1 or len(self.rho) != 2 or not 0 < self.rho[0] <= self.rho[1]:
            raise ValueError(
                "ADMM needs dampening > 0, rounds, turns and refit_steps >= 1, and rho=(first, last) that does not "
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
        scale, gram = scaled(inputs.dampened_gram(self.dampening))
        alive = weight != 0
        dense = weight.to(gram.dtype).contiguous() * scale
        target = torch.mm(dense, gram)
        keep = wanda = pattern(dense.abs(), sparsity)
        masked, gap = dense * keep, torch.zeros_like(dense)  # the dual variable in units of rho
        first, last = self.rho
        growth = (last / first) ** (1 / max(1, self.rounds - 1))
        for turn in range(self.rounds * self.turns):
            if turn % self.turns == 0:
                rho = first * growth ** (turn // self.turns)
                solve = inverse(gram, rho)
                if turn:
                    gap /= growth
            free = torch.mm(masked.sub_(gap).mul_(rho).add_(target), solve)
            wanted = gap.add_(free)
            keep = pattern(wanted.abs().mul_(alive), sparsity) & alive
            masked = wanted * keep
            gap = wanted.sub_(masked)
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
