"""Losses of rows of predictions, each with its gradient."""

from typing import Any

import torch
from torch import Tensor

from wanda_lightning.common.float64 import widened

_AT_ONCE = 2**22  # logits whose probabilities are in memory at the same time, 16 MiB in float32


def cross_entropy(predicted: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross entropy of tokens, summed over the rows with a token (not -1), and its gradient."""
    log_q = predicted.log_softmax(dim=-1)
    has_token = (tokens >= 0).to(predicted.dtype)
    index = tokens.clamp(min=0).unsqueeze(1)
    loss = -(log_q.gather(1, index).squeeze(1) * has_token).sum()

    # The gradient is the probability of each class, minus 1 at the token.
    gradient = log_q.exp_()
    gradient.scatter_add_(1, index, -gradient.new_ones(index.shape))
    return loss, gradient.mul_(has_token.unsqueeze(1))


def divergence(predicted: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
    """Return the divergence `KL(dense || predicted)`, summed over rows of logits, and its gradient at `predicted`."""
    log_q = predicted.log_softmax(dim=-1)
    terms, p = _divergence_terms(log_q, dense)
    return terms.sum(), log_q.exp_().sub_(p)


def row_divergences(predicted: Tensor, dense: Tensor) -> Tensor:
    """Return the divergence `KL(dense || predicted)` of each row of logits, of shape (rows,)."""
    terms, _ = _divergence_terms(predicted.log_softmax(dim=-1), dense)
    return terms.sum(dim=-1).clamp_(min=0)  # rounding may make it negative


def _divergence_terms(log_q: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
    """Return what each class adds to the divergence, and its dense probability."""
    log_p = dense.log_softmax(dim=-1)
    p = log_p.exp()
    # Both logarithms may be minus infinity where p is 0, and their difference is NaN.
    terms = ((log_p - log_q) * p).masked_fill_(p == 0, 0)
    return terms, p


def squared_error(predicted: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
    """Return the squared error summed over the rows and averaged over their entries, and its gradient."""
    # Both may be minus infinity, for a class that is impossible, and their difference is NaN.
    difference = (predicted - dense).masked_fill_(predicted == dense, 0)
    return difference.square().mean(dim=-1).sum(), difference.mul_(2 / difference.shape[-1])


def summed_divergence(
    predicted: Tensor, dense: Tensor, keep: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """Return `KL(dense || predicted)` of logits divided by a temperature, summed over rows, for autograd.

    Both are (rows, classes), and `keep` says which rows count. The sum is in float32, or in float64 for float64.

    The gradient is computed together with the loss, for some rows at a time, and is the only tensor of the size of the
    predictions that is held. Autograd of `log_softmax` and `kl_div` would hold several. The graph can be passed
    backward only once, because the gradient is changed in place.
    """
    if keep is None:
        keep = torch.ones(len(predicted), dtype=torch.bool, device=predicted.device)
    return _SummedDivergence.apply(predicted, dense, keep, temperature)  # type: ignore[no-untyped-call]


class _SummedDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, predicted: Tensor, dense: Tensor, keep: Tensor, temperature: float
    ) -> Tensor:
        # Rows that do not count keep a gradient of 0.
        gradient = torch.zeros_like(predicted)
        total = widened(predicted.new_zeros(()))
        at_once = max(1, _AT_ONCE // predicted.shape[-1])
        for rows in keep.nonzero().squeeze(1).split(at_once):
            loss, slopes = divergence(
                predicted[rows].to(total.dtype) / temperature,
                dense[rows].to(total.dtype) / temperature,
            )
            total += loss
            # Summed, not averaged: divided by many rows, the gradient would be zero in float16.
            gradient[rows] = slopes.div_(temperature).to(predicted.dtype)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        # In place, which PyTorch notices if the graph is passed backward again.
        return gradient.mul_(slope), None, None, None
