"""The predictions for one calibration sample, those of the dense model, and the loss that compares them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from wanda_lightning.calibration.samples import Sample, Samples, fit_together
from wanda_lightning.common.errors import UserError
from wanda_lightning.core.losses import cross_entropy, divergence, squared_error
from wanda_lightning.models import (
    Layer,
    causal_config,
    find_predictions,
    fitting_mask,
    has_classes,
    own_head,
)
from wanda_lightning.parallel import Processes

_MEDIA_TOKENS = [
    f"{kind}_token_{end}" for kind in ("image", "video", "audio") for end in ("id", "index")
]
HELD_OUT = 8  # every eighth sample is held out, if there are at least eight
_ROWS_AT_ONCE = 64  # predictions whose probabilities are in memory at the same time


def widened(x: Tensor) -> Tensor:
    """Return a tensor in float32, or in its own dtype if that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def mixed_precision(model: nn.Module, enabled: bool = True) -> AbstractContextManager[object]:
    """Run float32 models in bfloat16, if enabled, where the hardware supports it; keep the precision of a Trainer."""
    if not enabled:
        return nullcontext()
    kind = (parameter := next(model.parameters())).device.type
    active = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind)
    if not active and parameter.dtype == torch.float32:
        dtype = torch.bfloat16
        features = getattr(torch.cpu, "get_capabilities", dict[str, bool])()  # not in 2.10
        on_cpu = any(features.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
        # `mps` does not say.
        supports = getattr(torch.get_device_module(kind), "is_bf16_supported", None)
        active = (
            on_cpu
            if kind == "cpu"
            else supports is not None and supports(including_emulation=False)
        )
    # A cached cast that was made without gradients would cut the graph of the recomputed block.
    return torch.autocast(kind, dtype, enabled=active, cache_enabled=False)


def works(trial: Callable[[], bool], processes: Processes) -> bool:
    """Return whether a trial succeeds in all processes, without an exception; too little memory is an error."""
    with processes.fail_together():
        try:
            own = trial()
        except torch.OutOfMemoryError:
            raise
        except Exception:  # the code of a model may raise anything
            own = False
        return processes.all_agree(own)


def rows_of(predictions: Tensor, sample: Sample) -> Tensor:
    """Return the predictions of a sample as a matrix, without padding."""
    rows = predictions.flatten(0, -2)
    if mask := fitting_mask(sample.masks, "", predictions):
        rows = rows[mask.keep.flatten().to(rows.device)]
    return rows


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
    media = [id for name in _MEDIA_TOKENS if isinstance(id := getattr(config, name, None), int)]
    following[
        (following >= logits.shape[-1]) | torch.isin(following, torch.tensor(media).to(following))
    ] = -1
    if mask := fitting_mask(sample.masks, "", logits):
        following[~mask.keep.to(ids.device).roll(-1, dims=1)] = -1
    return rows_of(following.unsqueeze(-1), sample).squeeze(1).to(logits.device)


def predictions_of(output: object) -> Tensor:
    """Return the predictions in the output of a model; refuse an output without any."""
    found = find_predictions(output)
    if found is None:
        tensor = (
            f"tensor of shape {tuple(output.shape)}"
            if isinstance(output, Tensor)
            else type(output).__name__
        )
        raise UserError(
            "recovery=Distil() needs outputs, or their logits, to be tensors of at least two dimensions, but a batch "
            f"gave a {tensor}. Let forward= (or calibration_step) return the predictions, or use another recovery."
        )
    return found


@dataclass(frozen=True)
class DenseTarget:
    """The dense predictions for one sample, stored as the inputs of the output head or as the predictions."""

    rows: Tensor
    head: nn.Module | None

    def predictions(self) -> Callable[[slice], Tensor]:
        """Return a function that computes a slice of the dense predictions, (rows, classes)."""
        head = self.head
        rows = self.rows
        cast = dict[str, Tensor]()
        if head is None:
            return lambda part: rows[part]
        # It would cast the matrices anew for each slice.
        if torch.is_autocast_enabled(kind := rows.device.type):
            wide = {
                name: p
                for name, p in head.named_parameters()
                if p.ndim > 1 and p.dtype == torch.float32
            }
            cast = {name: p.detach().to(torch.get_autocast_dtype(kind)) for name, p in wide.items()}
        return lambda part: functional_call(head, cast, (rows[part],))


def dense_targets(
    samples: Sequence[Sample], data: Samples, head: nn.Module | None
) -> list[DenseTarget]:
    """Return what the dense model predicts for the samples of a batch, which may be empty."""
    if not samples:
        return []
    # Shows whether training will get gradients.
    with torch.set_grad_enabled(samples[0].batch_index == 0):
        first = _target(samples[0], head)
    with torch.no_grad():
        if len(samples) > 1 and len(first.rows) == 1 and fit_together(samples):
            others = _target(data.join(samples[1:]), head)
            if len(others.rows) == len(samples) - 1:
                return [first, *(DenseTarget(row, others.head) for row in others.rows.split(1))]
        return [first, *(_target(sample, head) for sample in samples[1:])]


def _target(sample: Sample, head: nn.Module | None) -> DenseTarget:
    entered: list[Tensor] = []
    hook = head and head.register_forward_pre_hook(lambda module, args: entered.extend(args))
    with hook or nullcontext():
        output = sample.predict()
    predictions = rows_of(predictions_of(output), sample)
    if torch.is_grad_enabled() and not predictions.requires_grad:
        raise UserError(
            "recovery=Distil() needs predictions with gradients, but those of the model have none, as after detach(). "
            "Let forward= (or calibration_step) return predictions with gradients, or use another recovery."
        )
    predictions = predictions.detach()
    if not (
        predictions < math.inf
    ).all():  # minus infinity is allowed: the logit of an impossible class
        raise UserError(
            f"recovery=Distil() needs finite predictions, but those of batch {sample.batch_index} (counted from 0) "
            "hold NaN or infinity. Check that batch, or load the model in float32 or bfloat16 rather than float16."
        )
    if head is not None and len(entered) == 1:
        rows = rows_of(entered[0].detach(), sample)
        # Enough to see whether the model changes the outputs of its head.
        part = slice(0, _ROWS_AT_ONCE)
        if len(rows) == len(predictions) and _nearly_equal(
            head(rows[part]).detach(), predictions[part]
        ):
            return DenseTarget(rows.clone(), head)
    return DenseTarget(predictions.clone(), None)


def output_head(model: nn.Module, layers: Sequence[Layer]) -> nn.Module | None:
    """Return the output head of the language model, which may be wrapped; None if there is none or it is pruned."""
    pruned = {id(layer.parameter) for layer in layers}
    head = next(
        (head for module in model.modules() if (head := own_head(module)) is not None), None
    )
    return (
        None
        if head is None or any(id(parameter) in pruned for parameter in head.parameters())
        else head
    )


def _nearly_equal(first: Tensor, second: Tensor) -> bool:
    """Return whether two predictions differ only by rounding; some models scale or cap the outputs of their head."""
    if not second.numel():  # a sample of padding
        return True
    tolerance = 4 * torch.finfo(second.dtype).eps * second.abs().max()
    return bool(((first - second).abs() <= tolerance).all())


class DistilLoss:
    """Compares the predictions of a pruned model with the dense ones, and with the next tokens of text; see `Distil`.

    The model runs in mixed precision if the sample, where there is one, does: the code of some models sets a dtype.
    """

    def __init__(
        self,
        model: nn.Module,
        kind: str | None,
        next_token: float,
        sample: Sample | None,
        processes: Processes,
    ) -> None:
        self._model = model
        self._kind = kind
        self._causal = causal_config(model)
        self._next_token = 0.0 if self._causal is None else next_token
        self._is_mixed = True
        self._is_mixed = works(
            lambda: sample is None or bool(self._run(sample, training=False)), processes
        )

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
        is_kl = self._kind == "kl" or (self._kind is None and has_classes(output))
        compare = divergence if is_kl else squared_error
        dense = target.predictions()
        tokens = next_tokens(output, sample, self._causal) if is_kl and self._next_token else None
        known = 0 if tokens is None else int((tokens >= 0).sum())
        share = self._next_token if known else 0.0
        loss = 0.0
        weight = (1 - share) / len(target.rows)
        gradient = None if scale is None else torch.empty_like(rows)
        with torch.no_grad():
            for start in range(0, len(rows), _ROWS_AT_ONCE):
                part = slice(start, start + _ROWS_AT_ONCE)
                predicted = widened(rows[part])
                value, slopes = compare(predicted, widened(dense(part)))
                value = value * weight
                slopes = slopes.mul_(weight)
                if tokens is not None and share:
                    entropy, more = cross_entropy(predicted, tokens[part])
                    value = value + entropy * (share / known)
                    slopes = slopes.add_(more, alpha=share / known)
                loss += float(value) * factor
                if gradient is not None and scale is not None:
                    gradient[part] = slopes.mul_(scale * factor)
        if gradient is not None:
            rows.backward(gradient)
        return loss

    def _run(self, sample: Sample, training: bool) -> tuple[object, Tensor]:
        with torch.set_grad_enabled(training), mixed_precision(self._model, self._is_mixed):
            output = sample.predict()
            return output, rows_of(predictions_of(output), sample)
