"""The predictions of one calibration sample, those of the dense model, and the tokens that they predict."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from wanda_lightning.calibration.samples import Sample
from wanda_lightning.models import Layer, find_predictions, fitting_mask, own_head

_MEDIA_TOKENS = [f"{kind}_token_{end}" for kind in ("image", "video", "audio") for end in ("id", "index")]
HELD_OUT = 8  # every eighth sample is held out, if there are at least eight


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


@dataclass(frozen=True)
class DenseTarget:
    """The dense predictions for one sample: the inputs of the output head, or the predictions themselves."""

    rows: Tensor
    head: nn.Module | None

    def predictions(self) -> Callable[[slice], Tensor]:
        """Return a function that gives some of the dense predictions, (rows, classes)."""
        head, rows = self.head, self.rows
        if head is None:
            return lambda part: rows[part]
        cast = _cast_by_autocast(head)
        return lambda part: functional_call(head, cast, (rows[part],))


def _cast_by_autocast(head: nn.Module) -> dict[str, Tensor]:
    """Return the matrices of a head in the dtype of autocast, which would cast them anew for all rows of each part."""
    parameters = dict(head.named_parameters())
    kinds = {parameter.device.type for parameter in parameters.values()}
    if not all(torch.is_autocast_enabled(kind) for kind in kinds):
        return {}
    return {
        name: parameter.detach().to(torch.get_autocast_dtype(parameter.device.type))
        for name, parameter in parameters.items()
        if parameter.ndim > 1 and parameter.dtype == torch.float32
    }


def output_head(model: nn.Module, layers: Sequence[Layer]) -> nn.Module | None:
    """Return the output head of the language model, which may be wrapped; None if there is none or it is pruned."""
    pruned = {id(layer.parameter) for layer in layers}
    for module in model.modules():
        head = own_head(module)
        if head is not None:
            return None if any(id(parameter) in pruned for parameter in head.parameters()) else head
    return None


def nearly_equal(first: Tensor, second: Tensor) -> bool:
    """Return whether two predictions differ only by rounding; some models scale or cap the outputs of their head."""
    if not second.numel():  # a sample of padding
        return True
    tolerance = 4 * torch.finfo(second.dtype).eps * second.abs().max()
    return bool(((first - second).abs() <= tolerance).all())
