"""Dampen, scale, factorize and invert the Gram matrix `X^T X`, and measure errors with it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor

from wanda_lightning.common.errors import UserError
from wanda_lightning.core.types import Gram, PerInput, Weight

log = logging.getLogger(__name__)

_ATTEMPTS = 5  # each with ten times the dampening of the previous one
_ROWS = 256  # enough for an error: all rows of a large layer would take as long as several percent of a forward pass


def dampened(gram: Gram, dampening: float) -> Gram:
    """Return `X^T X` with `dampening` times its mean diagonal added to the diagonal.

    Example:
        >>> dampened(torch.tensor([[1.0, 0.0], [0.0, 3.0]]), 0.5)
        tensor([[2., 0.],
                [0., 4.]])
    """
    return _dampen(gram.clone(), dampening)


def _dampen(gram: Gram, dampening: float) -> Gram:
    mean = gram.diagonal().mean()
    gram.diagonal().add_(torch.where(mean > 0, mean * dampening, 1))  # the identity if no input is active
    return gram


def cholesky(gram: Gram, dampening: float) -> tuple[Gram, float]:
    """Return the lower triangular `L` with `L L^T = dampened(X^T X)`, and the dampening that was used.

    If rounding makes the matrix indefinite, the dampening grows until it is definite, and a warning is logged. Raises a
    ValueError if it stays indefinite.
    """
    for attempt in range(_ATTEMPTS):
        used = dampening * 10**attempt
        # LAPACK works in place if the matrix is stored by columns.
        lower = _dampen(gram.t().clone(memory_format=torch.contiguous_format).t(), used)
        info = torch.empty((), dtype=torch.int32, device=gram.device)
        torch.linalg.cholesky_ex(lower, out=(lower, info))
        if not info:
            if attempt:
                log.warning(
                    "the Gram matrix of %d inputs has no Cholesky factor with dampening %g, so %g is used; more "
                    "calibration tokens would help",
                    len(gram),
                    dampening,
                    used,
                )
            return lower, used
    raise UserError(
        f"the Gram matrix of {len(gram)} inputs has no Cholesky factor, not even with dampening {used:g}. Give more "
        "calibration samples, or load the model in a wider dtype."
    )


def inverse_factor(gram: Gram, dampening: float) -> Gram:
    """Return the upper triangular `U` with `U^T U = dampened(X^T X)^-1`, dampened as by `cholesky`."""
    # In reverse order of the inputs, the inverse of the lower factor is the upper factor of the inverse.
    lower, _ = cholesky(gram.flip(0, 1), dampening)
    inverse = torch.eye(len(gram), dtype=gram.dtype, device=gram.device).t()  # by columns: the solution overwrites it
    torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
    del lower
    return inverse.flip(0, 1)


def scaled(gram: Gram, dampening: float) -> tuple[PerInput, Gram]:
    """Return a scale for each input, and the dampened Gram matrix of the inputs divided by it, whose diagonal is 1."""
    result = dampened(gram, dampening)
    scale = result.diagonal().sqrt()
    return scale, result.div_(scale).div_(scale[:, None])


def relative_error(
    dense: Weight,
    pruned: Weight,
    gram: Gram,
    fitted: Gram | None = None,
    total: Callable[[Tensor], Tensor] = lambda part: part,
) -> float | None:
    """Return `||(W - W') X^T||^2 / ||W X^T||^2`, the relative squared error of a layer's outputs; None if it overflows.

    Of more than 256 rows, about 256, evenly spaced, are compared. `fitted` is the Gram matrix of the error if it is
    not `gram`: that of centered inputs if the bias was fitted, too. `total` sums a tensor over all processes,
    if each holds only some of the rows.

    Example:
        >>> relative_error(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 4.0]]), torch.eye(2))
        0.36
    """
    every = max(1, -(-len(dense) // _ROWS))
    weight = dense[::every].to(gram.dtype)
    lost = weight - pruned[::every].to(gram.dtype)
    with torch.autocast(gram.device.type, enabled=False):
        pairs = (lost, gram if fitted is None else fitted), (weight, gram)
        sums = torch.stack([(torch.mm(each, matrix) * each).sum() for each, matrix in pairs])
    rows_per_compared = len(dense) / max(1, len(weight))  # which may differ between processes
    error, energy = total(sums * rows_per_compared).tolist()
    if not math.isfinite(error + energy):
        return None
    return max(0.0, error) / energy if energy > 0 else 0.0
