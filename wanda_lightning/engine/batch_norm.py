"""Correct the running statistics of BatchNorm layers after pruning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedBuffer

from wanda_lightning.calibration.error_notes import note_on_error
from wanda_lightning.calibration.interception import input_of
from wanda_lightning.calibration.samples import Sample, Samples
from wanda_lightning.core.losses import divergence, squared_error
from wanda_lightning.models import find_predictions, has_classes
from wanda_lightning.parallel import Processes
from wanda_lightning.report import BatchNormCorrection
from wanda_lightning.training.predictions import HELD_OUT, rows_of

_SAMPLES = 512  # maximum number of samples, over all processes

_AT_ONCE = 2**20  # numbers of a layer's input

_OPTION = (
    "The batches ran for BatchNorm layers: keep_batch_norm=True leaves their statistics alone."
)

_Moments = Sequence[Tensor]  # the mean and variance of each channel
# Index of the layer, number of its earlier calls, its input.
_Visit = Callable[[int, int, Tensor], None]


class BatchNormStatistics:
    """Moves the running statistics of BatchNorm layers by the change between the dense and the pruned model.

    Some calibration batches run through the dense model, and through the pruned one (`correct`). If a channel of a
    layer's inputs has mean m and variance v in the dense model, and m' and v' in the pruned one, and s = min(1, v'/v),

        running_mean = m' + sqrt(s) (running_mean - m),    running_var = v' + s (running_var - v).

    The difference between the running statistics and the statistics of the calibration batches remains, but shrinks if
    the variance of the inputs does. Where pruning does not change the inputs, nothing changes. A full estimate (m', v')
    would discard what training has averaged over far more data.

    In the pruned model, a layer is corrected whenever a batch reaches it, with the sums over all calls so far, and the
    sums over the same calls in the dense model. So later layers see inputs that corrected layers have normalized. With
    uncorrected inputs, the errors of the estimates multiply from layer to layer.

    If there are at least eight samples, every eighth is held out. If the correction moves the held-out predictions of
    the pruned model further from the dense ones, the original statistics are restored.

    The dense model runs during construction. Each process has a full copy of it, and the sums cover the samples of all.
    """

    def __init__(self, layers: Sequence[nn.Module], samples: Samples, processes: Processes) -> None:
        self._layers = layers
        self._processes = processes
        self._original = [
            [x.to("cpu", torch.float64, copy=True) for x in _buffers(layer)] for layer in layers
        ]
        self._dense: list[list[Tensor]] = [[] for _ in layers]  # the sums after each call
        if layers:
            with processes.fail_together(), note_on_error(lambda: _OPTION, kind=Exception):
                self._used, held_out = _divided(samples, -(-_SAMPLES // processes.world_size))
                self._run(self._record)
                self._held_out = [
                    (sample, *dense)
                    for sample in held_out
                    if (dense := _predict(sample)) is not None
                ]

    def correct(self) -> BatchNormCorrection | None:
        """Correct the pruned model, unless that makes its predictions worse; None if there are no layers."""
        if not self._layers:
            return None
        sizes = [
            sum(count for _, count in self._used),
            sum(sample.size for sample, _, _ in self._held_out),
        ]
        used, held_out = (
            sum(column) for column in zip(*self._processes.all_gather(sizes), strict=True)
        )
        with ExitStack() as undo:
            for layer, moments in enumerate(self._original):
                undo.callback(self._set, layer, moments)  # also after an error
            before = self._mean_distance()
            corrected = self._correct()
            after = self._mean_distance()
            kept = before is None or after is None or after <= before
            if kept:
                undo.pop_all()
        return BatchNormCorrection(corrected, used, held_out, before, after, kept)

    def _record(self, layer: int, call: int, inputs: Tensor) -> None:
        """Add the inputs of a layer of the dense model."""
        sums = self._dense[layer]
        sums.append(_sums(inputs) + (sums[-1] if sums else 0))

    def _correct(self) -> int:
        """Correct the statistics batch by batch, then by all batches of all processes; return how many layers."""
        pruned = self._zeros()

        def visit(layer: int, call: int, inputs: Tensor) -> None:
            pruned[layer] += _sums(inputs)
            if dense := self._dense[layer]:
                so_far = dense[min(call, len(dense) - 1)]
                self._set(layer, _moved(self._original[layer], so_far, pruned[layer]))

        with self._processes.fail_together():
            self._run(visit)
        totals = [
            sums[-1] if sums else zeros
            for sums, zeros in zip(self._dense, self._zeros(), strict=True)
        ]
        self._processes.all_reduce_sum([*totals, *pruned])
        reached = [
            layer
            for layer in range(len(totals))
            if bool(totals[layer][0].any() and pruned[layer][0].any())
        ]
        for layer in reached:
            self._set(layer, _moved(self._original[layer], totals[layer], pruned[layer]))
        return len(reached)

    def _run(self, visit: _Visit) -> None:
        """Run the chosen calibration batches, and call `visit` before each call of a layer."""
        calls = [0] * len(self._layers)
        count = 0
        size = 1

        def hook(
            index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> None:
            inputs = input_of(args, kwargs)
            # held-out samples come last.
            visit(index, calls[index], inputs[: len(inputs) * count // size])
            calls[index] += 1

        with ExitStack() as hooks:
            for index, layer in enumerate(self._layers):
                hooks.callback(
                    layer.register_forward_pre_hook(partial(hook, index), with_kwargs=True).remove
                )
            for batch, kept in self._used:
                count = kept
                size = max(1, batch.size)  # a batch may be empty
                batch.forward()

    def _zeros(self) -> list[Tensor]:
        return [torch.zeros(3, len(mean), dtype=torch.float64) for mean, _ in self._original]

    def _mean_distance(self) -> float | None:
        """Return the mean distance of the held-out predictions from the dense ones; None if none are held out."""
        total = torch.zeros(2, dtype=torch.float64)
        with self._processes.fail_together():
            for sample, dense, is_kl in self._held_out:
                predicted = _predict(sample)
                assert predicted is not None, "the dense model gave predictions"
                distance, _ = (divergence if is_kl else squared_error)(predicted[0], dense)
                total += torch.tensor([float(distance), len(dense)], dtype=torch.float64)
        self._processes.all_reduce_sum([total])
        return float(total[0] / total[1]) if total[1] else None

    def _set(self, layer: int, moments: _Moments) -> None:
        for buffer, values in zip(_buffers(self._layers[layer]), moments, strict=True):
            buffer.copy_(values)


def _divided(samples: Samples, most: int) -> tuple[list[tuple[Sample, int]], list[Sample]]:
    """Return the first batches, each with its number of samples that are not held out, and every eighth sample."""
    used: list[tuple[Sample, int]] = []
    held_out: list[Sample] = []
    seen = 0
    for batch in samples.first_batches(most):
        count = batch.size - (seen + batch.size) // HELD_OUT + seen // HELD_OUT
        used.append((batch, count))
        if count < batch.size:
            held_out.append(samples.subset(batch, count, batch.size))
        seen += batch.size
    return used, held_out


def batch_norm_layers(model: nn.Module) -> list[nn.Module]:
    """Return the BatchNorm layers that normalize by running statistics in evaluation mode.

    The frozen ones of detectors, which are classes of their own in every library, normalize by them in training, too.
    """
    layers = [
        m
        for m in model.modules()
        if isinstance(m, _BatchNorm) or "FrozenBatchNorm" in type(m).__name__
    ]
    without = (NoneType, UninitializedBuffer)
    return [
        m
        for m in layers
        if not any(isinstance(x, without) for x in (m.running_mean, m.running_var))
    ]


def _buffers(layer: nn.Module) -> tuple[Tensor, Tensor]:
    mean = layer.running_mean
    variance = layer.running_var
    assert isinstance(mean, Tensor)
    assert isinstance(variance, Tensor)
    return mean, variance


def _sums(inputs: Tensor) -> Tensor:
    """Return, for each channel, the number of values, their sum and the sum of their squares, as (3, channels)."""
    channels = inputs.shape[1]
    if not inputs.numel():
        return torch.zeros(3, channels, dtype=torch.float64)
    dims = [0, *range(2, inputs.ndim)]
    mean = inputs.mean(dims, dtype=torch.promote_types(inputs.dtype, torch.float32))
    center = mean[(..., *[None] * (inputs.ndim - 2))]
    # On a CPU, torch.var_mean takes five times as long as these parts.
    parts = inputs.split(max(1, _AT_ONCE * len(inputs) // inputs.numel()))
    deviations = torch.stack([(part - center).square().sum(dims) for part in parts])
    # float64: the difference of two sums of squares would lose a small variance.
    mean = mean.cpu().double()
    deviations = deviations.cpu().double()
    count = torch.full_like(mean, inputs.numel() // channels)
    return torch.stack([count, count * mean, deviations.sum(dim=0) + count * mean.square()])


def _moved(running: _Moments, dense: Tensor, pruned: Tensor) -> _Moments:
    """Return the running mean and variance after the change from the dense to the pruned sums."""
    (mean, variance), (m, v), (pruned_m, pruned_v) = (
        running,
        _mean_and_variance(dense),
        _mean_and_variance(pruned),
    )
    scale = torch.where(v > 0, pruned_v / v, 1.0).clamp(max=1)
    # This order of operations changes no bit if the two sums are equal.
    moved_mean = scale.sqrt() * mean + (pruned_m - scale.sqrt() * m)
    moved_variance = scale * variance + (pruned_v - scale * v).clamp(min=0)
    finite = moved_mean.isfinite() & moved_variance.isfinite()
    return torch.where(finite, moved_mean, mean), torch.where(finite, moved_variance, variance)


def _mean_and_variance(sums: Tensor) -> _Moments:
    count, total, squares = sums
    mean = total / count
    # Unbiased, like the running variance.
    return mean, (squares / count - mean.square()).clamp(min=0) * count / (count - 1).clamp(min=1)


def _predict(sample: Sample) -> tuple[Tensor, bool] | None:
    """Return the predictions of a sample as rows, and whether they are logits of classes; None if it has none."""
    try:
        output = sample.predict()
    except Exception:  # the module may not be able to predict, although its calibration_step runs
        return None
    predictions = find_predictions(output)
    if predictions is None:
        return None
    rows = rows_of(predictions, sample)
    return rows.to(torch.promote_types(rows.dtype, torch.float32), copy=True), has_classes(output)
