"""Correct the running statistics of BatchNorm layers after pruning."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Module

from wanda_lightning.calibration.error_notes import note_on_error
from wanda_lightning.calibration.interception import input_of
from wanda_lightning.calibration.samples import Sample, Samples
from wanda_lightning.common.float64 import wide_dtype
from wanda_lightning.core.losses import divergence, squared_error
from wanda_lightning.models import find_predictions, has_classes
from wanda_lightning.report import BatchNormCorrection
from wanda_lightning.training.predictions import HELD_OUT, rows_of

_MAX_SAMPLES = 512  # over all processes
_AT_ONCE = 2**20  # numbers of a layer's input
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_OPTION = (
    "The batches ran for BatchNorm layers: keep_batch_norm=True leaves their statistics alone."
)

# Index of the layer, number of its calls, its input.
_OnInput = Callable[[int, int, Tensor], None]


class _Moments(NamedTuple):
    """Mean and variance of each channel, on the CPU in float64."""

    mean: Tensor
    variance: Tensor


class _Predictions(NamedTuple):
    """Predictions of a sample as rows."""

    rows: Tensor
    are_logits: bool  # of classes


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

    Each process has a full copy of the model, and the sums cover the samples of all.
    """

    def __init__(self, layers: Sequence[Module], samples: Samples) -> None:
        self.layers = layers
        self._samples = samples
        self._processes = samples.processes
        self._original = [_moments_of(layer) for layer in layers]
        # The sums before the first call, and after each.
        self._dense_sums = [
            [torch.zeros(3, len(moments.mean), dtype=torch.float64)] for moments in self._original
        ]
        # How many samples of each batch are used, the first ones.
        self._used: dict[Sample, int] = {}
        # Samples that the correction does not see, and what the dense model predicts for them.
        self._held_out: dict[Sample, _Predictions] = {}

    def observe_dense(self) -> None:
        """Run the batches through the dense model."""
        with self._processes.fail_together(), note_on_error(lambda: _OPTION, kind=Exception):
            held_out = self._divide(-(-_MAX_SAMPLES // self._processes.world_size))
            self._run(self._add_dense)
            for sample in held_out:
                dense = _predict(sample)
                if dense:
                    self._held_out[sample] = dense

    def correct(self) -> BatchNormCorrection:
        """Correct the pruned model, unless that makes its predictions worse."""
        held_out = sum(sample.size for sample in self._held_out)
        sizes = torch.tensor([sum(self._used.values()), held_out])
        self._processes.all_reduce_sum([sizes])
        with ExitStack() as undo:
            for index, moments in enumerate(self._original):
                undo.callback(self._set, index, moments)  # also after an error
            before = self._mean_distance()
            corrected = self._correct()
            after = self._mean_distance()
            is_kept = before is None or after is None or after <= before
            if is_kept:
                undo.pop_all()
        return BatchNormCorrection(
            layers=corrected,
            samples=int(sizes[0]),
            held_out=int(sizes[1]),
            before=before,
            after=after,
            kept=is_kept,
        )

    def _divide(self, most: int) -> list[Sample]:
        """Choose the first batches, and return every eighth sample, which is held out."""
        held_out = []
        seen = 0
        for batch in self._samples.first_batches(most):
            following = seen + batch.size
            used = batch.size - (following // HELD_OUT - seen // HELD_OUT)
            self._used[batch] = used
            if used < batch.size:
                held_out.append(self._samples.subset(batch, used, batch.size))
            seen = following
        return held_out

    def _add_dense(self, index: int, call: int, inputs: Tensor) -> None:
        """Add the inputs of a layer of the dense model."""
        sums = self._dense_sums[index]
        sums.append(sums[-1] + _sums(inputs))

    def _correct(self) -> int:
        """Correct the statistics batch by batch, then by all batches of all processes; return how many layers."""
        pruned_sums = [torch.zeros_like(sums[0]) for sums in self._dense_sums]

        def correct_so_far(index: int, call: int, inputs: Tensor) -> None:
            pruned_sums[index] += _sums(inputs)
            calls = self._dense_sums[index]
            same_calls = calls[min(call, len(calls) - 1)]
            self._set(index, _moved(self._original[index], same_calls, pruned_sums[index]))

        with self._processes.fail_together():
            self._run(correct_so_far)

        dense_totals = [sums[-1] for sums in self._dense_sums]
        self._processes.all_reduce_sum([*dense_totals, *pruned_sums])
        corrected = 0
        for index, (dense, pruned) in enumerate(zip(dense_totals, pruned_sums, strict=True)):
            if dense[0].any() and pruned[0].any():
                self._set(index, _moved(self._original[index], dense, pruned))
                corrected += 1
        return corrected

    def _run(self, on_input: _OnInput) -> None:
        """Run the chosen calibration batches, and call `on_input` before each call of a layer."""
        calls = [0] * len(self.layers)
        used = 0
        size = 1

        def hook(index: int, module: Module, args: Any, kwargs: Any) -> None:
            inputs = input_of(args, kwargs)
            # Held-out samples come last. A layer may get several rows for each sample.
            calls[index] += 1
            on_input(index, calls[index], inputs[: len(inputs) * used // size])

        with ExitStack() as hooks:
            for index, layer in enumerate(self.layers):
                on_call = partial(hook, index)
                hooks.enter_context(layer.register_forward_pre_hook(on_call, with_kwargs=True))
            for batch, number in self._used.items():
                used = number
                size = max(1, batch.size)  # a batch may be empty
                batch.forward()

    def _mean_distance(self) -> float | None:
        """Return the mean distance of the held-out predictions from the dense ones; None if none are held out."""
        total = torch.zeros(2, dtype=torch.float64)
        with self._processes.fail_together():
            for sample, dense in self._held_out.items():
                predictions = _predict(sample)
                assert predictions, "the dense model gave predictions"
                loss = divergence if dense.are_logits else squared_error
                distance, _ = loss(predictions.rows, dense.rows)
                total += torch.tensor([float(distance), len(dense.rows)], dtype=torch.float64)
        self._processes.all_reduce_sum([total])
        return float(total[0] / total[1]) if total[1] else None

    def _set(self, index: int, moments: _Moments) -> None:
        layer: Any = self.layers[index]
        layer.running_mean.copy_(moments.mean)
        layer.running_var.copy_(moments.variance)


def batch_norm_layers(model: Module) -> list[Module]:
    """Return the BatchNorm layers that normalize by running statistics in evaluation mode.

    The frozen ones of detectors, which are classes of their own in every library, normalize by them in training, too.
    """
    layers = []
    for module in model.modules():
        is_frozen = "FrozenBatchNorm" in type(module).__name__
        is_batch_norm = is_frozen or isinstance(module, _BATCH_NORMS)
        if is_batch_norm and module.running_mean is not None:
            layers.append(module)
    return layers


def _moments_of(layer: Any) -> _Moments:
    mean = layer.running_mean.to("cpu", torch.float64, copy=True)
    variance = layer.running_var.to("cpu", torch.float64, copy=True)
    return _Moments(mean, variance)


def _sums(inputs: Tensor) -> Tensor:
    """Return, for each channel, the number of values, their sum and the sum of their squares, as (3, channels)."""
    channels = inputs.shape[1]
    if not inputs.numel():
        return torch.zeros(3, channels, dtype=torch.float64)

    positions = [0, *range(2, inputs.ndim)]
    mean = inputs.mean(positions, dtype=wide_dtype(inputs))
    center = mean.reshape(-1, *repeat(1, inputs.ndim - 2))
    # On a CPU, torch.var_mean takes five times as long as these parts.
    parts = inputs.split(max(1, _AT_ONCE * len(inputs) // inputs.numel()))
    deviations = torch.stack([(part - center).square().sum(positions) for part in parts])

    # float64: the difference of two sums of squares would lose a small variance.
    mean = mean.cpu().double()
    deviations = deviations.cpu().double()
    count = torch.full_like(mean, inputs.numel() // channels)
    return torch.stack([count, count * mean, deviations.sum(dim=0) + count * mean.square()])


def _moved(running: _Moments, dense_sums: Tensor, pruned_sums: Tensor) -> _Moments:
    """Return the running mean and variance after the change from the dense to the pruned sums."""
    dense = _moments_from(dense_sums)
    pruned = _moments_from(pruned_sums)
    scale = torch.where(dense.variance > 0, pruned.variance / dense.variance, 1.0).clamp(max=1)
    # This order of operations changes no bit if the two sums are equal.
    mean = scale.sqrt() * running.mean + (pruned.mean - scale.sqrt() * dense.mean)
    rest = (pruned.variance - scale * dense.variance).clamp(min=0)
    variance = scale * running.variance + rest

    is_finite = mean.isfinite() & variance.isfinite()
    return _Moments(
        torch.where(is_finite, mean, running.mean),
        torch.where(is_finite, variance, running.variance),
    )


def _moments_from(sums: Tensor) -> _Moments:
    count, total, squares = sums
    mean = total / count
    biased = (squares / count - mean.square()).clamp(min=0)
    # Unbiased, like the running variance.
    return _Moments(mean, biased * count / (count - 1).clamp(min=1))


def _predict(sample: Sample) -> _Predictions | None:
    """Return the predictions of a sample; None if it has none."""
    try:
        output = sample.predict()
    except Exception:  # the module may not be able to predict, although its calibration_step runs
        return None
    predictions = find_predictions(output)
    if predictions is None:
        return None
    rows = rows_of(predictions, sample)
    rows = rows.to(wide_dtype(rows), copy=True)
    return _Predictions(rows, has_classes(output))
