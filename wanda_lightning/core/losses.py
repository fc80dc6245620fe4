"""Losses of rows of predictions, each with its gradient."""

from __future__ import annotations

from torch import Tensor


def cross_entropy(predicted: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross entropy of tokens, summed over the rows with a token (not -1), and its gradient."""
    log_q, known = predicted.log_softmax(dim=-1), (tokens >= 0).to(predicted.dtype)
    index = tokens.clamp(min=0).unsqueeze(1)
    loss = -(log_q.gather(1, index).squeeze(1) * known).sum()
    slopes = log_q.exp_()
    slopes.scatter_add_(1, index, -slopes.new_ones(index.shape))
    return loss, slopes.mul_(known.unsqueeze(1))


def divergence(predicted: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
    """Return the divergence `KL(dense || predicted)`, summed over rows of logits, and its gradient at `predicted`."""
    log_q, log_p = predicted.log_softmax(dim=-1), dense.log_softmax(dim=-1)
    p = log_p.exp()
    terms = ((log_p - log_q) * p).masked_fill_(p == 0, 0)  # both logarithms may be minus infinity
    return terms.sum(), log_q.exp_().sub_(p)


def squared_error(predicted: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
    """Return the squared error summed over the rows and averaged over their entries, and its gradient."""
    difference = predicted - dense
    return difference.square().mean(dim=-1).sum(), difference.mul_(2 / difference.shape[-1])
