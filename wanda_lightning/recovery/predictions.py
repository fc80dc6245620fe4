"""The predictions of one calibration sample, and the tokens that it predicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from wanda_lightning.calibration.batches import Sample
from wanda_lightning.models import find_predictions, fitting_mask

_MEDIA_TOKENS = [f"{kind}_token_{end}" for kind in ("image", "video", "audio") for end in ("id", "index")]
HELD_OUT = 8  # every eighth sample is held out, if there are at least eight


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
