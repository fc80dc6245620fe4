"""The predictions for one calibration sample, those of the dense model, and the loss that compares them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import Module

from wanda_lightning.calibration.samples import Sample, Samples, fit_together
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.float64 import widened
from wanda_lightning.core.losses import cross_entropy, divergence, squared_error
from wanda_lightning.models import (
    Layer,
    find_predictions,
    fitting_mask,
    has_classes,
    head_within,
)
from wanda_lightning.parallel import Processes

# Names of settings of transformers: ids of placeholders, which a model never predicts.
_MEDIA_TOKENS = [
    "image_token_id",
    "image_token_index",
    "video_token_id",
    "video_token_index",
    "audio_token_id",
    "audio_token_index",
]
HELD_OUT = 8  # every eighth sample is held out, if there are at least eight
_ROWS_AT_ONCE = 64  # predictions whose probabilities are in memory at the same time


def mixed_precision(model: Module, enabled: bool = True) -> AbstractContextManager[object]:
    """Run float32 models in bfloat16, if enabled, where the hardware supports it; keep the precision of a Trainer."""
    if not enabled:
        return nullcontext()
    parameter = next(model.parameters())
    device = parameter.device.type
    active = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device)
    if not active and parameter.dtype == torch.float32:
        dtype = torch.bfloat16
        active = _supports_bfloat16(device)
    # A cached cast that was made without gradients would cut the graph of the recomputed block.
    return torch.autocast(device, dtype, enabled=active, cache_enabled=False)


def _supports_bfloat16(device: str) -> bool:
    """Return whether the hardware multiplies in bfloat16, rather than emulating it."""
    if device == "cpu":
        features = getattr(torch.cpu, "get_capabilities", dict[str, bool])()  # not in 2.10
        return any(features.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    # `mps` does not say.
    supports = getattr(torch.get_device_module(device), "is_bf16_supported", None)
    return supports is not None and supports(including_emulation=False)


def works(trial: Callable[[], bool], processes: Processes) -> bool:
    """Return whether a trial succeeds in all processes, without an exception; too little memory is an error."""
    with processes.fail_together():
        try:
            succeeded = trial()
        except torch.OutOfMemoryError:
            raise
        except Exception:  # the code of a model may raise anything
            succeeded = False
        return processes.all_agree(succeeded)


def rows_of(predictions: Tensor, sample: Sample) -> Tensor:
    """Return the predictions of a sample as a matrix, without padding."""
    rows = predictions.flatten(0, -2)
    mask = fitting_mask(sample.masks, "", predictions)
    if mask is None:
        return rows
    return rows[mask.keep.flatten().to(rows.device)]


def next_tokens(output: object, sample: Sample, config: Any) -> Tensor | None:
    """Return the id of the token that follows each row of the predictions, or -1 if there is none to predict.

    Placeholders for images, videos and audio, which the config names, are not predicted. The result is None if the
    sample has no `input_ids`, or not one prediction for each of them.
    """
    ids = sample.batch.get("input_ids") if isinstance(sample.batch, Mapping) else None
    logits = find_predictions(output)
    if not isinstance(ids, Tensor) or logits is None or logits.shape[:-1] != ids.shape:
        return None
    following = ids.roll(-1, dims=1)
    following[:, -1] = -1

    settings = [getattr(config, name, None) for name in _MEDIA_TOKENS]
    media = torch.tensor([id for id in settings if isinstance(id, int)]).to(following)
    # Some vocabularies have ids of images for which the head has no row.
    following[(following >= logits.shape[-1]) | torch.isin(following, media)] = -1
    mask = fitting_mask(sample.masks, "", logits)
    if mask:
        following[~mask.keep.to(ids.device).roll(-1, dims=1)] = -1
    return rows_of(following.unsqueeze(-1), sample).squeeze(1).to(logits.device)


def predictions_of(output: object) -> Tensor:
    """Return the predictions in the output of a model; refuse an output without any."""
    predictions = find_predictions(output)
    if predictions is None:
        kind = type(output).__name__
        if isinstance(output, Tensor):
            kind = f"tensor of shape {tuple(output.shape)}"
        raise UserError(
            "recovery=Distill() needs outputs, or their logits, to be tensors of at least two dimensions, but a batch "
            f"gave a {kind}. Let forward= (or calibration_step) return the predictions, or use another recovery."
        )
    return predictions


class DenseTarget(NamedTuple):
    """The dense predictions for one sample, stored as the inputs of the output head or as the predictions."""

    rows: Tensor
    head: Module | None

    def predictions(self) -> Callable[[slice], Tensor]:
        """Return a function that computes a slice of the dense predictions, (rows, classes)."""
        head = self.head
        rows = self.rows
        device = rows.device.type
        if head is None:
            return lambda part: rows[part]

        # Autocast would cast the matrices of the head anew for each slice.
        narrow = {}
        if torch.is_autocast_enabled(device):
            for name, parameter in head.named_parameters():
                if parameter.ndim > 1 and parameter.dtype == torch.float32:
                    narrow[name] = parameter.detach().to(torch.get_autocast_dtype(device))
        return lambda part: functional_call(head, narrow, (rows[part],))


def dense_targets(
    samples: Sequence[Sample], data: Samples, head: Module | None
) -> list[DenseTarget]:
    """Return what the dense model predicts for the samples of a batch, which may be empty."""
    if not samples:
        return []
    # With gradients in the first batch, to refuse predictions that have none before anything is written.
    with torch.set_grad_enabled(samples[0].batch_index == 0):
        first = _target(samples[0], head)
    others = samples[1:]
    with torch.no_grad():
        if others and len(first.rows) == 1 and fit_together(samples):
            joined = _target(data.join(others), head)
            if len(joined.rows) == len(others):
                return [first, *(DenseTarget(row, joined.head) for row in joined.rows.split(1))]
        return [first, *(_target(sample, head) for sample in others)]


def _target(sample: Sample, head: Module | None) -> DenseTarget:
    """Return what the dense model predicts for a sample; as the inputs of the head if they are enough."""
    head_inputs = []
    hook: AbstractContextManager[object] = nullcontext()
    if head is not None:
        hook = head.register_forward_pre_hook(lambda module, args: head_inputs.extend(args))
    with hook:
        output = sample.predict()
    predictions = rows_of(predictions_of(output), sample)
    _refuse_unusable(predictions, sample)
    predictions = predictions.detach()
    # The inputs of the head are much smaller than the predictions, if there are many classes.
    if head is not None and len(head_inputs) == 1:
        rows = rows_of(head_inputs[0].detach(), sample)
        if len(rows) == len(predictions) and gives_predictions(head, rows, predictions):
            return DenseTarget(rows.clone(), head)
    return DenseTarget(predictions.clone(), None)


def gives_predictions(head: Module, inputs: Tensor, predictions: Tensor) -> bool:
    """Whether the outputs of the head are the predictions, except for rounding; some models scale or cap them.

    A few rows show it.
    """
    outputs = head(inputs[:_ROWS_AT_ONCE]).detach()
    expected = predictions[:_ROWS_AT_ONCE]
    if outputs.shape != expected.shape:
        return False
    if not expected.numel():  # a sample of padding
        return True
    # Logits of impossible classes are minus infinity; no other logit is close to it.
    largest = expected.masked_fill(expected.isinf(), 0).abs().max()
    tolerance = 4 * torch.finfo(expected.dtype).eps * float(largest)
    return torch.allclose(outputs.to(expected.dtype), expected, rtol=0, atol=tolerance)


def _refuse_unusable(predictions: Tensor, sample: Sample) -> None:
    """Raise an error for dense predictions that training cannot approach."""
    if torch.is_grad_enabled() and not predictions.requires_grad:
        raise UserError(
            "recovery=Distill() needs predictions with gradients, but those of the model have none, as after detach(). "
            "Let forward= (or calibration_step) return predictions with gradients, or use another recovery."
        )
    # Minus infinity is the logit of an impossible class.
    if not (predictions < math.inf).all():
        raise UserError(
            f"recovery=Distill() needs finite predictions, but those of batch {sample.batch_index} (counted from 0) "
            "hold NaN or infinity. Check that batch, or load the model in float32 or bfloat16 rather than float16."
        )


def output_head(model: Module, layers: Sequence[Layer]) -> Module | None:
    """Return the output head of the language model, which may be wrapped; None if there is none or it is pruned."""
    pruned = {layer.parameter for layer in layers}
    head = head_within(model)
    if head is None or not pruned.isdisjoint(head.parameters()):
        return None
    return head


@dataclass(frozen=True)
class DistillLoss:
    """Compares predictions of a pruned model with the dense ones, and with the next tokens of text; see `Distill`."""

    model: Module
    kind: str | None
    next_token: float
    causal: Any  # configuration of a causal language model of transformers, or None
    is_mixed: bool = True  # whether the model may run in mixed precision

    def in_supported_precision(self, sample: Sample | None, processes: Processes) -> DistillLoss:
        """Run a sample, if there is one, in mixed precision; return the loss without it if that fails in any process.

        The code of some models sets a dtype.
        """
        runs = works(lambda: sample is None or bool(self._run(sample, training=False)), processes)
        return replace(self, is_mixed=runs)

    def __call__(
        self, sample: Sample, target: DenseTarget, factor: float, scale: float | None
    ) -> float:
        """Return the loss of a sample times a factor, after passing its gradient, times a scale, backward.

        Without a scale, nothing is passed backward. The gradient is computed by hand for some rows at a time: cross
        entropy would hold several tensors of the size of all predictions.
        """
        output, rows = self._run(sample, training=scale is not None)
        if not len(rows):  # a sample of padding
            return 0.0
        is_kl = self.kind == "kl" or (self.kind is None and has_classes(output))
        compare = divergence if is_kl else squared_error
        dense = target.predictions()
        tokens = self._tokens_to_learn(output, sample) if is_kl else None
        weight = 1 / len(target.rows)
        token_weight = 0.0
        if tokens is not None:
            weight = (1 - self.next_token) / len(target.rows)
            token_weight = self.next_token / int((tokens >= 0).sum())

        loss = 0.0
        gradient = torch.empty_like(rows)
        with torch.no_grad():
            for start in range(0, len(rows), _ROWS_AT_ONCE):
                part = slice(start, start + _ROWS_AT_ONCE)
                predicted = widened(rows[part])
                value, slopes = compare(predicted, widened(dense(part)))
                value *= weight
                slopes *= weight
                if tokens is not None:
                    entropy, entropy_slopes = cross_entropy(predicted, tokens[part])
                    value += entropy * token_weight
                    slopes.add_(entropy_slopes, alpha=token_weight)
                loss += float(value) * factor
                if scale is not None:
                    gradient[part] = slopes.mul_(scale * factor)
        if scale is not None:
            rows.backward(gradient)
        return loss

    def _tokens_to_learn(self, output: object, sample: Sample) -> Tensor | None:
        """Return the token that follows each prediction; None if there is none to learn."""
        if self.causal is None or not self.next_token:
            return None
        tokens = next_tokens(output, sample, self.causal)
        if tokens is None or (tokens < 0).all():
            return None
        return tokens

    def _run(self, sample: Sample, training: bool) -> tuple[object, Tensor]:
        with torch.set_grad_enabled(training), mixed_precision(self.model, self.is_mixed):
            output = sample.predict()
            return output, rows_of(predictions_of(output), sample)
