"""Train the kept weights of the whole pruned model to predict like the dense model."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from wanda_lightning.calibration.batches import Sample, fit_together
from wanda_lightning.calibration.error_notes import noting
from wanda_lightning.calibration.recomputation import recomputing
from wanda_lightning.common.checks import Number, OneOf, check
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.progress import ProgressBar
from wanda_lightning.core.losses import cross_entropy, divergence, squared_error
from wanda_lightning.core.masking import mask_
from wanda_lightning.models import causal_config, find_predictions, has_classes
from wanda_lightning.parallel import Processes
from wanda_lightning.report import Training, TrainingPass
from wanda_lightning.training.masked_weights import TrainedWeight, trained_parameters, training
from wanda_lightning.training.predictions import (
    HELD_OUT,
    DenseTarget,
    nearly_equal,
    next_tokens,
    output_head,
    rows_of,
    widened,
)
from wanda_lightning.training.recovery import DenseModel, ModelRecovery, Recovery

log = logging.getLogger(__name__)

_WARM_UP = 4  # optimizer steps
_SCALE = 2.0**16  # of the loss: small gradients are zero in float16; a power of two leaves other dtypes unchanged
_PREDICTIONS = 8  # in an optimizer step, at least; a window of text has one for each token, an image a single one
_STOPPED = "The model is pruned. It holds the best weights that distillation found before it was stopped."
_ROWS_AT_ONCE = 64  # predictions whose probabilities are in memory at the same time


@dataclass(frozen=True)
class Distil(Recovery):
    """Train the kept weights so that the pruned model predicts like the dense model on the calibration samples.

    After all layers are pruned, AdamW minimizes the Kullback-Leibler divergence from the dense to the pruned model's
    predictions (Hinton et al. 2015, temperature 1), averaged over the tokens of each sample. For language models whose
    batches hold `input_ids`, half of the loss is the cross entropy of the next token instead. The masks are fixed. The
    weights of the pruned layers and all vectors (norms, biases, layer scales) are trained; embeddings, head and other
    dense layers are not. The learning rate of each tensor is relative to the root mean square of its kept weights; it
    warms up over four steps and decays to 0 along a cosine.

    If there are at least eight samples, over all processes, every eighth is held out, and the held-out loss is measured
    before training and after each pass. The weights with the lowest held-out loss are kept, which may be those from
    before training. All passes run, since the loss may rise at first, while the learning rate is high. With fewer
    samples none is held out, and the weights of the last pass are kept. If a loss or gradient is NaN or infinite, or on
    Ctrl-C, training stops and the best weights so far are kept; the report or a log message says so.

    A sample is one entry of the first dimension of a batch, and runs by itself. If the model expects another dimension
    first, such as time, give batches with samples first and let `forward=` rearrange them. A batch is one sample if its
    tensors differ in length.

    No dense copy of the model is kept: the dense predictions are computed from the stored inputs of the output head, or
    are stored themselves. Blocks are recomputed in the backward pass, except those that write into their arguments or
    receive an object with tensors, such as a key-value cache. Models in float32 run in bfloat16 (autocast) where the
    hardware supports it. Weights in bfloat16 and float16 are trained as copies in float32.

    Attributes:
        passes: Number of passes over the samples.
        learning_rate: Largest learning rate of AdamW, relative to the root mean square of a tensor's kept weights.
        batch_size: Number of samples in an optimizer step, over all processes. None chooses as many as have 8
            predictions: one window of at least 8 tokens, or 8 images. Samples with one prediction and equal shapes
            run as one batch.
        loss: `"kl"`, or `"mse"` for the mean squared error of the outputs; None chooses `"kl"` for outputs of shape
            (samples, classes) and for `logits` of shape (samples, tokens, classes), and `"mse"` for all others.
        next_token: Share of the loss that is the cross entropy of the next token, in [0, 1]; the rest is the
            divergence. It applies to causal language models of transformers, but not with `"mse"`.
        seed: Seed of the order of the samples.
    """

    passes: int = 3
    learning_rate: float = 1e-3
    batch_size: int | None = None
    loss: Literal["kl", "mse"] | None = None
    next_token: float = 0.5
    seed: int = 0

    reads_batches: ClassVar[bool] = True

    def __post_init__(self) -> None:
        at_least_1 = Number(minimum=1, whole=True)
        check(self, passes=at_least_1, learning_rate=Number(above=0, maximum=1))
        check(self, seed=Number(minimum=0, whole=True), next_token=Number(minimum=0, maximum=1))
        if self.batch_size is not None:
            check(self, batch_size=at_least_1)
        if self.loss is not None:
            check(self, loss=OneOf(("kl", "mse")))

    def check_processes(self, world_size: int, is_sharded: bool) -> None:
        """Require that each process holds the whole model."""
        if is_sharded:
            raise UserError(
                "recovery=Distil() trains a model that each process holds as a whole, but this one is sharded. Prune "
                "before sharding (devices=1), or without recovery."
            )

    def start_model(self, dense: DenseModel) -> ModelRecovery:
        """Store the predictions of the dense model."""
        return _Distillation(self, dense)


_Comparison = Callable[[Tensor, slice], tuple[Tensor, Tensor]]


class _Distillation(ModelRecovery):
    """Trains a model toward the predictions that it made before it was pruned.

    All processes share one order of the samples. Each runs only its own, and all apply the same steps.
    """

    def __init__(self, config: Distil, dense: DenseModel) -> None:
        self._config, self._model, self._layers, self._blocks = config, dense.model, dense.layers, dense.blocks
        self._processes, self._progress, self._data = dense.processes, dense.progress, dense.data
        self._head = output_head(self._model, self._layers)
        self._causal = causal_config(self._model)
        self._next_token = 0.0 if self._causal is None else config.next_token
        if not trained_parameters(self._model, self._layers, self._head):
            raise UserError(
                "recovery=Distil() trains the pruned layers and all vectors, but requires_grad is False for "
                "each of them. Call requires_grad_() on the parameters to train, or use another recovery."
            )
        with ProgressBar("Predicting", self._data.length, self._progress) as bar, recomputing(self._blocks):
            batches = []
            with self._processes.fail_together():
                for samples in self._data.samples():
                    batches.append([*zip(samples, self._targets(samples), strict=True)])
                    bar.advance()
            self._data.refuse_if_empty()
        self._samples = _in_one_order(batches, self._processes)
        self._scale = _SCALE
        self._batch_size = self._config.batch_size or self._usual_batch_size()

    def _usual_batch_size(self) -> int:
        """Return the number of samples that have enough predictions for a step, on average over all processes."""
        rows = [len(target.rows) for _, target in filter(None, self._samples)]
        counts = self._processes.all_gather([len(rows), sum(rows)])
        samples, predictions = (sum(column) for column in zip(*counts, strict=True))
        return max(1, _PREDICTIONS * samples // max(1, predictions))

    def _targets(self, samples: Sequence[Sample]) -> list[DenseTarget]:
        """Return what the dense model predicts for the samples of a batch."""
        with torch.set_grad_enabled(samples[0].batch_index == 0):  # shows whether training will get gradients
            first = self._target(samples[0])
        with torch.no_grad():
            if len(samples) > 1 and len(first.rows) == 1 and fit_together(samples):
                others = self._target(self._data.join(samples[1:]))
                if len(others.rows) == len(samples) - 1:
                    return [first, *(DenseTarget(row, others.head) for row in others.rows.split(1))]
            return [first, *(self._target(sample) for sample in samples[1:])]

    def _target(self, sample: Sample) -> DenseTarget:
        head = self._head
        entered: list[Tensor] = []
        with ExitStack() as hooks:
            if head is not None:
                hook = head.register_forward_pre_hook(lambda module, args: entered.extend(args))
                hooks.callback(hook.remove)
            output = sample.predict()
        predictions = rows_of(_predictions(output), sample)
        _refuse_untrainable(predictions, sample.batch_index)
        predictions = predictions.detach()
        if head is not None and len(entered) == 1:
            rows = rows_of(entered[0].detach(), sample)
            part = slice(0, _ROWS_AT_ONCE)  # enough to see whether the model changes the outputs of its head
            if len(rows) == len(predictions) and nearly_equal(head(rows[part]).detach(), predictions[part]):
                return DenseTarget(rows.clone(), head)
        return DenseTarget(predictions.clone(), None)

    def train(self) -> Training:
        """Train, and leave the best weights in the model."""
        held = [index for index in range(len(self._samples)) if index % HELD_OUT == HELD_OUT - 1]
        trained = [index for index in range(len(self._samples)) if index not in held]
        steps = math.ceil(len(trained) / self._batch_size)
        with (
            noting(lambda: _STOPPED, log.warning),  # Lightning does not show the notes of an interrupted run
            training(self._model, self._layers, self._head) as weights,
            recomputing(self._blocks),
            ProgressBar("Distilling", self._config.passes * (steps + 1), self._progress) as bar,
        ):
            optimizer, schedule = self._optimizer(weights, self._config.passes * steps)
            lowest = self._mean_loss(held)
            best, passes, stopped = [weight.values() for weight in weights], [TrainingPass(None, lowest)], ""
            try:
                for number in range(1, self._config.passes + 1):
                    bar.show(f"pass {number}")
                    losses = []
                    for chosen in self._order(trained, number):
                        losses.append(self._step(chosen, weights, optimizer))
                        schedule.step()
                        bar.advance()
                    after = self._mean_loss(held)
                    if after is not None and not math.isfinite(after):
                        raise _NotFiniteError("held-out loss")
                    passes.append(TrainingPass(sum(losses) / len(losses), after))
                    bar.advance()
                    if after is None or lowest is None or after < lowest:
                        lowest, best = after, [weight.values() for weight in weights]
            except _NotFiniteError as error:
                step = (len(passes) - 1) * steps + len(losses) + 1
                stopped = f"the {error} of step {step} was not finite, so training stopped: use a lower learning_rate"
            finally:
                for weight, values in zip(weights, best, strict=True):
                    weight.set(values)
        return Training(repr(self._config), len(trained), len(held), tuple(passes), stopped)

    def _order(self, trained: Sequence[int], number: int) -> Iterator[Sequence[int]]:
        """Yield the samples of each step of a pass."""
        generator = torch.Generator().manual_seed(self._config.seed + number)
        shuffled = [trained[index] for index in torch.randperm(len(trained), generator=generator).tolist()]
        yield from self._batches(shuffled)

    def _batches(self, samples: Sequence[int]) -> Iterator[Sequence[int]]:
        return (samples[start : start + self._batch_size] for start in range(0, len(samples), self._batch_size))

    def _optimizer(self, weights: Sequence[TrainedWeight], steps: int) -> tuple[Any, Any]:
        groups = [{"params": [each.master], "lr": self._config.learning_rate * each.scale()} for each in weights]
        fused = all(each.master.device.type in ("cpu", "cuda") for each in weights)
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=fused)

        def factor(step: int) -> float:
            return min(1.0, (step + 1) / _WARM_UP) * (1 + math.cos(math.pi * min(1.0, step / steps))) / 2

        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

    def _step(self, chosen: Sequence[int], weights: Sequence[TrainedWeight], optimizer: torch.optim.Optimizer) -> float:
        """Take one optimizer step on some samples, and return their mean loss before the step.

        If the gradients overflow, they are computed again with a smaller scale, as no sample should be left out.

        Raises:
            _NotFiniteError: Before the step, if the loss or a gradient is NaN or infinite.
        """
        loss, is_finite = self._gradients(chosen, weights)
        while not is_finite and self._scale > 1:
            self._scale /= 16
            loss, is_finite = self._gradients(chosen, weights)
        if not is_finite:
            raise _NotFiniteError("gradient")
        optimizer.step()
        for weight in weights:
            weight.write()
        return loss

    def _gradients(self, chosen: Sequence[int], weights: Sequence[TrainedWeight]) -> tuple[float, bool]:
        """Compute the gradients of the mean loss over some samples; return the loss, and whether they are finite.

        Raises:
            _NotFiniteError: If the loss is NaN or infinite.
        """
        total = torch.zeros(1)
        with self._processes.fail_together():
            for sample, target, count in self._own(chosen):
                total += self._loss(sample, target, count / len(chosen))
        gradients = [weight.take_gradient(self._scale) for weight in weights]
        self._processes.all_reduce_sum([total, *gradients])
        if not total.isfinite():
            raise _NotFiniteError("loss")
        for weight, gradient in zip(weights, gradients, strict=True):
            mask_(gradient, weight.keep)
            weight.master.grad = gradient
        return float(total), bool(torch.stack([gradient.sum().isfinite().cpu() for gradient in gradients]).all())

    def _own(self, chosen: Sequence[int]) -> list[tuple[Sample, DenseTarget, int]]:
        """Return the forward passes for the chosen samples of this process, each with its number of samples."""
        own = [own for index in chosen if (own := self._samples[index]) is not None]
        samples, targets = [sample for sample, _ in own], [target for _, target in own]
        fits = len(own) > 1 and all(len(target.rows) == 1 for target in targets) and fit_together(samples)
        if fits and len({target.head for target in targets}) == 1:
            rows = torch.cat([target.rows for target in targets])
            return [(self._data.join(samples), DenseTarget(rows, targets[0].head), len(own))]
        return [(sample, target, 1) for sample, target in own]

    @torch.no_grad()
    def _mean_loss(self, chosen: Sequence[int]) -> float | None:
        """Return the mean loss over some samples; None if there are no samples."""
        total = torch.zeros(1)
        with self._processes.fail_together():
            for part in self._batches(chosen):
                for sample, target, count in self._own(part):
                    total += self._loss(sample, target, count / len(chosen), backward=False)
        self._processes.all_reduce_sum([total])
        return float(total) if chosen else None

    def _loss(self, sample: Sample, target: DenseTarget, factor: float, backward: bool = True) -> float:
        """Return the loss of a sample times a factor, after passing its gradient, times the scale, backward.

        The gradient is computed by hand for some rows at a time: cross entropy would hold several tensors of the size
        of all predictions.
        """
        with torch.set_grad_enabled(backward), _mixed_precision(self._model):
            output = sample.predict()
            rows = rows_of(_predictions(output), sample)
        if not len(rows):  # a sample of padding
            return 0.0
        gradient = torch.empty_like(rows) if backward else None
        loss, compare = 0.0, self._comparison(output, sample, target)
        with torch.no_grad():
            for start in range(0, len(rows), _ROWS_AT_ONCE):
                part = slice(start, start + _ROWS_AT_ONCE)
                value, slopes = compare(widened(rows[part]), part)
                loss += float(value) * factor
                if gradient is not None:
                    gradient[part] = slopes.mul_(self._scale * factor)
        if gradient is not None:
            rows.backward(gradient)
        return loss

    def _comparison(self, output: object, sample: Sample, target: DenseTarget) -> _Comparison:
        """Return the function that compares some rows of predictions: their part of the loss, and its gradient."""
        is_kl = self._config.loss == "kl" or (self._config.loss is None and has_classes(output))
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


class _NotFiniteError(Exception):
    """A loss or a gradient is NaN or infinite."""


def _mixed_precision(model: nn.Module) -> torch.autocast:
    """Run float32 models in bfloat16 where the hardware supports it natively; keep the precision set by a Trainer."""
    parameter = next(model.parameters())
    kind = parameter.device.type
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    if not enabled and parameter.dtype == torch.float32 and kind in ("cuda", "cpu"):
        enabled = torch.cuda.is_bf16_supported(including_emulation=False) if kind == "cuda" else _cpu_has_bfloat16()
        dtype = torch.bfloat16
    # A cached cast that was made without gradients would cut the graph of the recomputed block.
    return torch.autocast(kind, dtype, enabled=enabled, cache_enabled=False)


def _cpu_has_bfloat16() -> bool:
    features = torch.cpu.get_capabilities()
    return any(features.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _in_one_order(
    batches: Sequence[Sequence[tuple[Sample, DenseTarget]]], processes: Processes
) -> list[tuple[Sample, DenseTarget] | None]:
    """Return the samples of all processes in one order; None stands for a sample of another process.

    Batch i of all processes precedes batch i + 1 of any, so that the order depends on the batches alone.
    """
    order: list[tuple[Sample, DenseTarget] | None] = []
    longest = max(number for (number,) in processes.all_gather([len(batches)]))
    sizes = processes.all_gather([len(batch) for batch in batches] + [0] * (longest - len(batches)))
    for index in range(longest):
        for rank in range(processes.world_size):
            order += batches[index] if rank == processes.rank and index < len(batches) else [None] * sizes[rank][index]
    return order


def _refuse_untrainable(predictions: Tensor, batch: int) -> None:
    if torch.is_grad_enabled() and not predictions.requires_grad:
        raise UserError(
            "recovery=Distil() needs predictions with gradients, but the predictions of the model have none, as under "
            "torch.no_grad() or after detach(). Let forward= (or calibration_step) return predictions with gradients, "
            "or use another recovery."
        )
    if not (predictions < math.inf).all():  # minus infinity is allowed: the logit of an impossible class
        raise UserError(
            f"recovery=Distil() needs finite predictions, but those of batch {batch} (counted from 0) hold NaN or "
            "infinity. Check that batch, or load the model in a wider dtype (float32 or bfloat16 rather than float16)."
        )


def _predictions(output: object) -> Tensor:
    found = find_predictions(output)
    if found is None:
        raise UserError(
            "recovery=Distil() needs outputs, or their logits, to be tensors of at least two dimensions, but a batch "
            f"gave {_kind(output)}. Let forward= (or calibration_step) return the predictions, or use another recovery."
        )
    return found


def _kind(found: object) -> str:
    return f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
