"""What solvers need of a Gram matrix `X^T X`: dampened, factorised, inverted, scaled."""

from __future__ import annotations

import logging

import torch

from wanda_lightning.core.types import Gram, PerInput

log = logging.getLogger(__name__)

_TRIES = 5  # each with ten times the dampening of the one before


def dampened(gram: Gram, dampening: float) -> Gram:
    """`X^T X` with a share of its mean diagonal added to the diagonal.

    Example:
        >>> dampened(torch.tensor([[1.0, 0.0], [0.0, 3.0]]), 0.5)
        tensor([[2., 0.],
                [0., 4.]])
    """
    mean = gram.diagonal().mean()
    result = gram.clone()
    result.diagonal().add_(torch.where(mean > 0, mean * dampening, 1))  # without any active input all are alike
    return result


def cholesky(gram: Gram, dampening: float) -> Gram:
    """The lower triangular `L` with `L L^T = X^T X + dampening`.

    Where rounding makes the matrix indefinite, the dampening grows until it is not, and a warning says so.

    Raises:
        ValueError: If it stays indefinite.
    """
    for tried in range(_TRIES):
        lower, info = torch.linalg.cholesky_ex(dampened(gram, dampening * 10**tried))
        if not info:
            if tried:
                log.warning(
                    "a Gram matrix of %d inputs has no Cholesky factor with dampening %g: using %g (more calibration "
                    "tokens would help)",
                    len(gram),
                    dampening,
                    dampening * 10**tried,
                )
            return lower
    raise ValueError(
        f"a Gram matrix of {len(gram)} inputs has no Cholesky factor, not even with dampening "
        f"{dampening * 10 ** (_TRIES - 1):g}: give more calibration tokens, or a wider dtype"
    )


def inverse_factor(gram: Gram, dampening: float) -> Gram:
    """The upper triangular `U` with `U^T U = (X^T X + dampening)^-1`; dampened as in `cholesky`."""
    # With all columns in reverse, the inverse of the lower factor is the upper factor of the inverse.
    lower = cholesky(gram.flip(0, 1), dampening)
    one = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve_triangular(lower, one, upper=False).flip(0, 1)


def scaled(gram: Gram, dampening: float) -> tuple[PerInput, Gram]:
    """The scale of each input, and the dampened matrix of the inputs divided by it: its diagonal is 1."""
    wide = dampened(gram, dampening)
    scale = wide.diagonal().sqrt()
    return scale, wide.div_(scale).div_(scale[:, None])
