"""Extract the predictions from the output of a model, and measure their distance from dense predictions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from wanda_lightning.calibration.batches import Sample
from wanda_lightning.models import fitting_mask

_MEDIA_TOKENS = [f"{kind}_token_{end}" for kind in ("image", "video", "audio") for end in ("id", "index")]
HELD_OUT = 8  # every eighth sample is held out, if there are at least eight


def find_predictions(output: object) -> Tensor | None:
    """Return the logits of an output, or the output if it is a tensor; None if there are no predictions."""
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if isinstance(found, tuple | list) and found:
        found = found[0]
    return found if isinstance(found, Tensor) and found.is_floating_point() and found.ndim > 1 else None


def has_classes(output: object) -> bool:
    """Return whether the last dimension of the predictions holds classes, judging by where they are and their shape."""
    predictions = find_predictions(output)
    if predictions is None or predictions.shape[-1] < 2:
        return False
    has_logits = predictions is not output and not isinstance(output, tuple | list)
    # Logits with more dimensions are images, whose last dimension is the width.
    return predictions.ndim in ((2, 3) if has_logits else (2,))


def rows_of(predictions: Tensor, sample: Sample) -> Tensor:
    """Return the predictions of a sample as a matrix, without padding."""
    rows = predictions.flatten(0, -2)
    if mask := fitting_mask(sample.masks, "", predictions):
        rows = rows[mask.keep.flatten().to(rows.device)]
    return rows


def causal_config(model: nn.Module) -> Any | None:
    """Return the config of a causal language model of transformers without an encoder, which a model is or contains."""
    for module in model.modules():
        can_generate = getattr(module, "can_generate", None)
        if callable(can_generate) and can_generate():
            return None if getattr(module.config, "is_encoder_decoder", False) else module.config
    return None


def next_tokens(output: object, sample: Sample, config: Any) -> Tensor | None:
    """Return the id of the token that follows each row of the predictions, -1 where none follows.

    None follows where the config of the model says that the id stands for a part of an image, a video or audio. The
    result is None if the sample has no `input_ids`, or not one prediction for each of them.
    """
    ids = sample.batch.get("input_ids") if isinstance(sample.batch, Mapping) else None
    logits = find_predictions(output)
    if not isinstance(ids, Tensor) or logits is None or logits.shape[:-1] != ids.shape:
        return None
    following = ids.roll(-1, dims=1)
    following[:, -1] = -1
    media = [id for name in _MEDIA_TOKENS if isinstance(id := getattr(config, name, None), int)]
    following[(following >= logits.shape[-1]) | torch.isin(following, torch.tensor(media).to(following))] = -1
    if mask := fitting_mask(sample.masks, "", logits):
        following[~mask.keep.to(ids.device).roll(-1, dims=1)] = -1
    return rows_of(following.unsqueeze(-1), sample).squeeze(1).to(logits.device)


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
