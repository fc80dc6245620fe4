"""Perplexity over windows of tokens."""

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from wanda_lightning.common.float64 import has_float64, widened

_CHUNK = 2**22  # logits per step of the loss, 16 MiB in float32


def predicted_tokens(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return which tokens count as predictions: those that follow another token, except padding.

    All tensors have the shape (batch, tokens); the attention mask is zero at padding.
    """
    predicted = torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask is not None:
        real = attention_mask != 0
        predicted = real & real.roll(1, dims=1)
    predicted[:, 0] = False
    return predicted


def window_losses(logits: Tensor, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return the mean next-token loss of each window, of shape (batch,): `logsumexp(logits) - logits[target]`.

    The logits have the shape (batch, tokens, vocabulary); the loss is computed in float32, or in float64 for float64.
    It is NaN for a window without predicted tokens.
    """
    # In chunks: all logits in float32 would need twice the memory of those in bfloat16.
    size = max(1, _CHUNK // logits.shape[-1])
    chunks = logits.flatten(0, 1).split(size)
    targets = input_ids.roll(-1, dims=1).flatten()  # the last token of a window has no target
    losses = []
    for chunk, target in zip(chunks, targets.split(size), strict=True):
        wide = widened(chunk)
        losses.append(wide.logsumexp(-1) - wide.gather(-1, target[:, None])[:, 0])

    # `where`, since the loss at padding may be NaN.
    has_target = predicted_tokens(input_ids, attention_mask).roll(-1, dims=1)
    token_losses = torch.cat(losses).view(has_target.shape).where(has_target, 0)
    return token_losses.sum(dim=1) / has_target.sum(dim=1)


class WindowPerplexity(Metric):
    r"""Perplexity as pruning papers report it: `exp` of the mean over windows of each window's mean next-token loss.

    It equals the perplexity over all tokens only if all windows have the same length. A window without predicted tokens
    (only padding, or one token) is ignored; without any other window the result is NaN.

    >>> logits = torch.zeros(1, 5, 50)  # all 50 tokens are equally likely
    >>> metric = WindowPerplexity()
    >>> metric.update(logits, torch.randint(50, (1, 5)))
    >>> round(metric.compute().item(), 4)
    50.0
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    loss_sum: Tensor
    square_sum: Tensor  # of the losses
    windows: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Lightning moves metrics to the accelerator, which may have no float64.
        device = torch.accelerator.current_accelerator(check_available=True)
        dtype = torch.float64 if device is None or has_float64(device) else torch.float32
        for name in ("loss_sum", "square_sum"):
            self.add_state(name, torch.zeros((), dtype=dtype), dist_reduce_fx="sum")
        self.add_state("windows", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(
        self, logits: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> None:
        """Add windows; arguments as for `window_losses`."""
        losses = window_losses(logits, input_ids, attention_mask)
        is_counted = predicted_tokens(input_ids, attention_mask).any(dim=1)
        counted = losses.to(self.loss_sum.dtype).where(is_counted, 0)
        # Not in place: a state that was reset in inference mode cannot be modified outside of it.
        self.loss_sum = self.loss_sum + counted.sum()
        self.square_sum = self.square_sum + counted.square().sum()
        self.windows = self.windows + is_counted.sum()

    def compute(self) -> Tensor:
        """Return `exp(loss_sum / windows)`."""
        return torch.exp(self.loss_sum / self.windows)

    def standard_error(self) -> float:
        """Return the standard error of the perplexity, from the deviation of the windows of this process.

        It is not finite for a single window, and where the perplexity is not.
        """
        windows = float(self.windows)
        if windows < 2:
            return math.nan
        mean = float(self.loss_sum) / windows
        variance = max(0.0, float(self.square_sum) - windows * mean**2) / (windows - 1)
        # To first order: the derivative of exp(x) is exp(x).
        return float(self.compute()) * math.sqrt(variance / windows)
