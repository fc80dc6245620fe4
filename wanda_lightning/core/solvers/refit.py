"""Fit the kept weights anew to what the dense layer gave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from wanda_lightning.core.hyperparameters import Number, check
from wanda_lightning.core.selection import Selection
from wanda_lightning.core.solvers.base import Solver, as_numbers, masked
from wanda_lightning.core.statistics import InputStatistics
from wanda_lightning.core.types import Gram, KeepMask, Weight


@dataclass(frozen=True)
class Refit(Solver):
    """Choose as `ZeroOut` does, then give the kept weights their least-squares values.

    Each row minimises `||(w - w') X^T||^2 + dampening * mean(diag(X^T X)) * ||w - w'||^2` over what is kept of it, by
    conjugate gradients on all rows at once, preconditioned with the diagonal. The mask does not change.

    Attributes:
        dampening: Pull towards the weights as they were, as a share of the mean diagonal; more where there are few
            calibration tokens.
        steps: Of conjugate gradients, at the most.
    """

    dampening: float = 0.1
    steps: int = 30

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})

    def __post_init__(self) -> None:
        check(self, dampening=Number(minimum=0), steps=Number(minimum=1, whole=True))

    def __call__(self, weight: Weight, inputs: InputStatistics, selection: Selection) -> tuple[Weight, KeepMask]:
        """Choose, then fit."""
        keep = selection.keep(weight, inputs)
        gram = inputs.dampened_gram(self.dampening)
        dense = weight.to(gram.dtype).contiguous()
        fitted, _ = refitted(dense, masked(dense, keep), keep, gram, self.steps)
        return fitted.to(weight.dtype), keep


def refitted(
    dense: Weight, start: Weight, keep: KeepMask, gram: Gram, steps: int
) -> tuple[Weight, Float[Tensor, "d_out 1"]]:
    """The kept weights that come nearest to `dense` in the norm of `gram`, from `start` on.

    Rows whose residual has become a millionth of what it was stop; so do all after `steps`.

    Returns:
        The weights, and the square of how far each row still is from `dense` in that norm.
    """
    inverse_diagonal = gram.diagonal().clamp(min=torch.finfo(gram.dtype).tiny).reciprocal()
    fitted = start.clone()
    difference = dense - start
    residual = torch.mm(difference, gram)
    error = difference.mul_(residual).sum(dim=1, keepdim=True)
    residual.mul_(as_numbers(keep))
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
        before, energy = energy, (residual * scaled).sum(dim=1, keepdim=True)
        direction = scaled.addcmul_(torch.where(active, energy / before, 0), direction)
    return fitted, error
