"""Refit the kept weights to the outputs of the dense layer by least squares."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from wanda_lightning.common.checks import COUNT, Number, check
from wanda_lightning.core.masking import as_numbers, masked
from wanda_lightning.core.selection import Selection
from wanda_lightning.core.solvers.solver import Solver
from wanda_lightning.core.statistics import InputStatistics, cholesky, dampen_
from wanda_lightning.core.types import Gram, KeepMask, Solved, Weight


@dataclass(frozen=True)
class Refit(Solver):
    """Choose weights like `ZeroOut`, then refit the kept ones by least squares.

    For each row, `||(w - w') X^T||^2 + dampening * mean(diag(X^T X)) * ||w - w'||^2` is minimized over the kept
    weights, by conjugate gradients on all rows at once with the diagonal as preconditioner. If whole columns are kept,
    all rows have the same equations, which a Cholesky factorization solves exactly. With a bias, X holds the inputs
    minus their means, and the bias makes up for the difference of the means: the least squares with an intercept.

    Attributes:
        dampening: Pull toward the dense weights, as a fraction of the mean diagonal; raise it for few calibration
            tokens.
        steps: Maximum number of conjugate gradient steps.
        intercept: Fit the bias of a layer, if it has one, together with its weights.
    """

    needs = frozenset({"gram", "sum"})
    dampening: float = 0.1
    steps: int = 30
    intercept: bool = True

    def __post_init__(self) -> None:
        check(self, dampening=Number(minimum=0), steps=COUNT)
        check(self, intercept=(True, False))

    def __call__(self, weight: Weight, inputs: InputStatistics, selection: Selection) -> Solved:
        """Choose, then refit."""
        keep = selection.keep(weight, inputs)
        if selection.pattern.removes == "units":
            return refit_columns(weight, keep[0], inputs.sums["gram"], self.dampening), keep

        gram = dampen_(inputs.sums["gram"].clone(), self.dampening)
        dense = weight.to(gram.dtype).contiguous()
        fitted, _ = refit(dense, masked(dense, keep), keep, gram, self.steps)
        return fitted.to(weight.dtype), keep


def refit_columns(
    dense: Weight, keep: Bool[Tensor, " d_in"], gram: Gram, dampening: float
) -> Weight:
    """Return the weights of the kept columns S that minimize the error of `Refit`, and zeros in the other columns.

    With the Gram matrix G and the pull p toward the dense weights, they are `(W G[:, S] + p W[:, S]) (G[S, S] + p)^-1`.
    """
    if not dense[:, ~keep].any():  # pruned already, or nothing to prune
        return dense.clone()

    kept = keep.nonzero().flatten()
    wide = dense.to(gram.dtype).contiguous()
    lower, used = cholesky(gram[kept][:, kept], dampening)
    mean = gram.diagonal()[kept].mean()
    pull = torch.where(mean > 0, mean * used, 1)  # as in `dampen_`
    target = torch.mm(gram[kept], wide.t())
    target += pull * wide[:, kept].t()

    fitted = torch.zeros_like(dense)
    fitted[:, kept] = torch.cholesky_solve(target, lower).t().to(fitted.dtype)
    return fitted


def refit(
    dense: Weight, start: Weight, keep: KeepMask, gram: Gram, steps: int
) -> tuple[Weight, Float[Tensor, "d_out 1"]]:
    """Return the kept weights that are nearest to `dense` in the norm of `gram`, and each row's squared distance.

    A row is done when its residual energy has fallen to 1e-12 of the initial one, or after `steps` steps.
    """
    fitted = start.clone()
    difference = dense - start
    residual = torch.mm(difference, gram)
    error = difference.mul_(residual).sum(dim=1, keepdim=True)
    residual.mul_(as_numbers(keep))

    # Conjugate gradients with the diagonal as preconditioner.
    inverse_diagonal = gram.diagonal().clamp(min=torch.finfo(gram.dtype).tiny).reciprocal()
    direction = residual * inverse_diagonal
    energy = (residual * direction).sum(dim=1, keepdim=True)
    enough = energy * 1e-12
    for _ in range(steps):
        image = torch.mm(direction, gram)
        curvature = (direction * image).sum(dim=1, keepdim=True)
        active = (energy > enough) & (curvature > 0)
        if not active.any():
            break

        step = torch.where(active, energy / curvature, 0)
        fitted.addcmul_(step, direction)
        error -= step * energy
        residual.addcmul_(step, image.mul_(as_numbers(keep)), value=-1)

        scaled = residual * inverse_diagonal
        previous_energy = energy
        energy = (residual * scaled).sum(dim=1, keepdim=True)
        ratio = torch.where(active, energy / previous_energy, 0)
        direction = scaled.addcmul_(ratio, direction)
    return fitted, error
