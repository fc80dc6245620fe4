"""The predictions for one calibration sample as rows, and the tokens that they predict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from wanda_lightning.calibration.batches import Sample
from wanda_lightning.common.errors import UserError
from wanda_lightning.models import find_predictions, fitting_mask

_MEDIA_TOKENS = [f"{kind}_token_{end}" for kind in ("image", "video", "audio") for end in ("id", "index")]
HELD_OUT = 8  # every eighth sample is held out, if there are at least eight
ROWS_AT_ONCE = 64  # predictions whose probabilities are in memory at the same time


def widened(x: Tensor) -> Tensor:
    """Return a tensor in float32, or in its own dtype if that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rows_of(predictions: Tensor, sample: Sample) -> Tensor:
    """Return the predictions of a sample as a matrix, without padding."""
    rows = predictions.flatten(0, -2)
    if mask := fitting_mask(sample.masks, "", predictions):
        rows = rows[mask.keep.flatten().to(rows.device)]
    return rows


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


def predictions_of(output: object) -> Tensor:
    """Return the predictions in the output of a model; refuse an output without any."""
    found = find_predictions(output)
    if found is None:
        raise UserError(
            "recovery=Distil() needs outputs, or their logits, to be tensors of at least two dimensions, but a batch "
            f"gave {_kind(output)}. Let forward= (or calibration_step) return the predictions, or use another recovery."
        )
    return found


def _kind(found: object) -> str:
    return f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
