"""The loss of a sample in distillation, and its gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from wanda_lightning.calibration.samples import Sample
from wanda_lightning.core.losses import cross_entropy, divergence, squared_error
from wanda_lightning.models import causal_config, has_classes
from wanda_lightning.parallel import Processes
from wanda_lightning.training.predictions import (
    ROWS_AT_ONCE,
    DenseTarget,
    mixed_precision,
    next_tokens,
    predictions_of,
    rows_of,
    widened,
    works,
)

_Comparison = Callable[[Tensor, slice], tuple[Tensor, Tensor]]


class DistilLoss:
    """Compares the predictions of a pruned model with the dense ones, and with the next tokens of text."""

    def __init__(self, model: nn.Module, kind: str | None, next_token: float) -> None:  # see `Distil`
        self._model, self._kind, self._causal = model, kind, causal_config(model)
        self._is_mixed = True
        self._next_token = 0.0 if self._causal is None else next_token

    def __call__(self, sample: Sample, target: DenseTarget, factor: float, scale: float | None) -> float:
        """Return the loss of a sample times a factor, after passing its gradient, times a scale, backward.

        Without a scale, nothing is passed backward. The gradient is computed by hand for some rows at a time: cross
        entropy would hold several tensors of the size of all predictions.
        """
        output, rows = self._run(sample, training=scale is not None)
        if not len(rows):  # a sample of padding
            return 0.0
        gradient = None if scale is None else torch.empty_like(rows)
        loss, compare = 0.0, self._comparison(output, sample, target)
        with torch.no_grad():
            for start in range(0, len(rows), ROWS_AT_ONCE):
                part = slice(start, start + ROWS_AT_ONCE)
                value, slopes = compare(widened(rows[part]), part)
                loss += float(value) * factor
                if gradient is not None and scale is not None:
                    gradient[part] = slopes.mul_(scale * factor)
        if gradient is not None:
            rows.backward(gradient)
        return loss

    def choose_precision(self, sample: Sample | None, processes: Processes) -> None:
        """Leave mixed precision if a sample does not run in it, as where the code of the model sets a dtype.

        None stands for a process without samples.
        """
        self._is_mixed = works(lambda: sample is None or bool(self._run(sample, training=False)), processes)

    def _run(self, sample: Sample, training: bool) -> tuple[object, Tensor]:
        with torch.set_grad_enabled(training), mixed_precision(self._model, self._is_mixed):
            output = sample.predict()
            return output, rows_of(predictions_of(output), sample)

    def _comparison(self, output: object, sample: Sample, target: DenseTarget) -> _Comparison:
        """Return the function that compares some rows of predictions: their part of the loss, and its gradient."""
        is_kl = self._kind == "kl" or (self._kind is None and has_classes(output))
        compare, dense, count = divergence if is_kl else squared_error, target.predictions(), len(target.rows)
        tokens = next_tokens(output, sample, self._causal) if is_kl and self._next_token else None
        known = 0 if tokens is None else int((tokens >= 0).sum())
        share = self._next_token if known else 0.0

        def part_of_loss(rows: Tensor, part: slice) -> tuple[Tensor, Tensor]:
            value, slopes = compare(rows, widened(dense(part)))
            loss, gradient = value * ((1 - share) / count), slopes.mul_((1 - share) / count)
            if tokens is not None and share:
                value, slopes = cross_entropy(rows, tokens[part])
                loss, gradient = loss + value * (share / known), gradient.add_(slopes, alpha=share / known)
            return loss, gradient

        return part_of_loss
