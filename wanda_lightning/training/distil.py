"""Train the kept weights of the whole pruned model to predict like the dense model."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from wanda_lightning.calibration.error_notes import noting
from wanda_lightning.calibration.recomputation import recomputing
from wanda_lightning.calibration.samples import Sample, fit_together
from wanda_lightning.common.checks import SEED, Number, check, check_flags
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.progress import ProgressBar
from wanda_lightning.models import Unit
from wanda_lightning.parallel import SINGLE_PROCESS, Processes
from wanda_lightning.report import Training, TrainingPass
from wanda_lightning.training.distil_loss import DistilLoss
from wanda_lightning.training.masked_weights import MaskedWeights, NotFiniteError
from wanda_lightning.training.over_processes import in_one_order, sum_over_processes
from wanda_lightning.training.predictions import HELD_OUT, DenseTarget, dense_targets, output_head
from wanda_lightning.training.reconstruct import Reconstruct
from wanda_lightning.training.recovery import DenseModel, ModelRecovery, Recovery, UnitRecovery

log = logging.getLogger(__name__)

_WARM_UP = 4  # optimizer steps
_PREDICTIONS = 8  # in an optimizer step, at least; a window of text has one for each token, an image a single one
_ENOUGH = 512  # predictions in a step for the largest usual learning rate
_STEPS = 48  # optimizer steps of `_ENOUGH` predictions that the default number of passes aims at
_MOST_PASSES = 3  # by default
_STOPPED = "The model is pruned. It holds the best weights that distillation found before it was stopped."


@dataclass(frozen=True)
class Distil(Recovery):
    """Train the kept weights so that the pruned model predicts like the dense model on the calibration samples.

    After all layers are pruned (and, with `blocks`, after each block is trained), AdamW minimizes the Kullback-Leibler
    divergence from the dense to the pruned model's predictions (Hinton et al. 2015, temperature 1), averaged over the
    tokens of each sample. For language models whose batches hold `input_ids`, half of the loss is the cross entropy of
    the next token instead. The masks are fixed. The weights of the pruned layers and all vectors (norms, biases, layer
    scales) are trained; embeddings, head and other dense layers are not. The learning rate of each tensor is relative
    to the root mean square of its kept weights; it warms up over four steps and decays to 0 along a cosine.

    If there are at least eight samples, over all processes, every eighth is held out, and the held-out loss is measured
    before training and after each pass. The weights with the lowest held-out loss are kept, which may be those from
    before training. All passes run, since the loss may rise at first, while the learning rate is high. With fewer
    samples none is held out, and the weights of the last pass are kept. If a loss or gradient is NaN or infinite, or on
    Ctrl-C, training stops and the best weights so far are kept; the report or a log message says so.

    A sample is one entry of the first dimension of a batch, and runs by itself. If the model expects another dimension
    first, such as time, give batches with samples first and let `forward=` rearrange them. A batch is one sample if its
    tensors differ in length, or if its entries have other predictions alone than together.

    No dense copy of the model is kept: the dense predictions are computed from the stored inputs of the output head, or
    are stored themselves. Blocks are recomputed in the backward pass, except those that write into their arguments or
    receive an object with tensors, such as a key-value cache. Models in float32 run in bfloat16 (autocast) where the
    hardware and the code of the model support it. Weights in bfloat16 and float16 are trained as copies in float32.

    Attributes:
        passes: Number of passes over the samples. None chooses 1 to 3, for about 48 steps of 512 predictions. For
            windows of 512 tokens or more, one in a step, that is 3 passes over 16, 2 over 32, and 1 over 64 or more;
            for up to about 10,000 images, 3.
        learning_rate: Largest learning rate of AdamW, relative to the root mean square of a tensor's kept weights. None
            chooses 0.001 for steps of 512 predictions or more, and `0.001 * sqrt(n / 512)` for n, since the gradients
            of few are noisy (Malladi et al. 2022): 0.000125 for 8 images.
        batch_size: Number of samples in an optimizer step, over all processes. None chooses as many as have 8
            predictions: one window of at least 8 tokens, or 8 images. Samples with one prediction and equal shapes
            run as one batch.
        loss: `"kl"`, or `"mse"` for the mean squared error of the outputs; None chooses `"kl"` for outputs of shape
            (samples, classes) and for `logits` of shape (samples, tokens, classes) or (samples, classes, height,
            width), and `"mse"` for all others.
        next_token: Share of the loss that is the cross entropy of the next token, in [0, 1]; the rest is the
            divergence. It applies to causal language models of transformers, but not with `"mse"`.
        seed: Seed of the order of the samples.
        blocks: Whether to train each block for its own output right after it is pruned, as `Reconstruct` does. With
            None, blocks are trained in image models, since an image has one prediction, but many positions at which a
            block has an output; not with `sequential="layer"`, nor with patterns of whole hidden units.
    """

    passes: int | None = None
    learning_rate: float | None = None
    batch_size: int | None = None
    loss: Literal["kl", "mse"] | None = None
    next_token: float = 0.5
    seed: int = 0
    blocks: bool | None = None

    reads_batches: ClassVar[bool] = True

    def __post_init__(self) -> None:
        at_least_1 = Number(minimum=1, whole=True)
        check(self, seed=SEED, next_token=Number(minimum=0, maximum=1))
        if self.passes is not None:
            check(self, passes=at_least_1)
        if self.learning_rate is not None:
            check(self, learning_rate=Number(above=0, maximum=1))
        if self.batch_size is not None:
            check(self, batch_size=at_least_1)
        if self.loss is not None:
            check(self, loss=("kl", "mse"))
        if self.blocks is not None:
            check_flags(blocks=self.blocks)

    @property
    def _for_blocks(self) -> Recovery:
        return Reconstruct() if self.blocks else Recovery()

    @property
    def needs(self) -> frozenset[str]:
        """The statistics that training each block reads."""
        return self._for_blocks.needs

    @property
    def recorded(self) -> int:
        """Number of hidden states that training each block records."""
        return self._for_blocks.recorded

    def for_model(self, is_image: bool, sequential: str) -> Recovery:
        """Decide about `blocks=None`."""
        return replace(self, blocks=is_image and sequential != "layer") if self.blocks is None else self

    def why_not(self, sequential: str) -> str | None:
        """Return why blocks cannot be trained."""
        return self._for_blocks.why_not(sequential)

    def start(self, unit: Unit, processes: Processes = SINGLE_PROCESS) -> UnitRecovery:
        """Start to train a block."""
        return self._for_blocks.start(unit, processes)

    def start_model(self, dense: DenseModel) -> ModelRecovery:
        """Store the predictions of the dense model."""
        return _Distillation(self, dense)


class _Distillation(ModelRecovery):
    """Trains a model toward the predictions that it made before it was pruned.

    All processes share one order of the samples. Each runs only its own, and all apply the same steps.
    """

    def __init__(self, config: Distil, dense: DenseModel) -> None:
        self._dense, self._processes = dense, dense.processes
        head = output_head(dense.model, dense.layers)
        pruned = {id(layer.parameter) for layer in dense.layers}
        fixed = {id(parameter) for parameter in head.parameters()} if head is not None else set()
        self._parameters: list[nn.Parameter] = [
            parameter
            for parameter in dense.model.parameters()
            if parameter.requires_grad
            and id(parameter) not in fixed
            and not isinstance(parameter, UninitializedParameter)
            and (id(parameter) in pruned or parameter.ndim < 2)
        ]
        if not self._parameters:
            raise UserError(
                "recovery=Distil() trains the pruned layers and all vectors, but requires_grad is False for "
                "each of them. Call requires_grad_() on the parameters to train, or use another recovery."
            )
        with ProgressBar("Predicting", dense.data.length, dense.progress) as bar, recomputing(dense.blocks):
            batches = []
            with self._processes.fail_together():
                for samples in map(dense.data.split, dense.data):
                    batches.append([*zip(samples, dense_targets(samples, dense.data, head), strict=True)])
                    bar.advance()
            dense.data.refuse_if_empty()
        self._samples = in_one_order(batches, self._processes)
        if not self._samples:
            raise UserError(
                "batches must hold at least one sample for recovery=Distil(), but all of them are empty. Give batches "
                "whose tensors have samples in their first dimension."
            )
        self._held = [index for index in range(len(self._samples)) if index % HELD_OUT == HELD_OUT - 1]
        self._trained = [index for index in range(len(self._samples)) if index not in self._held]
        self._loss = DistilLoss(dense.model, config.loss, config.next_token)
        self._loss.choose_precision(next((sample for sample, _ in filter(None, self._samples)), None), self._processes)
        self._batch_size, rate, passes = self._usual(config.batch_size)
        self._config = replace(config, passes=config.passes or passes, learning_rate=config.learning_rate or rate)

    def _usual(self, size: int | None) -> tuple[int, float, int]:
        """Return the size of a step, its learning rate, and the number of passes.

        If the size is None, the smallest with enough predictions is chosen. The number of predictions of a sample is
        the mean over all processes.
        """
        rows = [len(target.rows) for _, target in filter(None, self._samples)]
        counts = self._processes.all_gather([len(rows), sum(rows)])
        samples, predictions = (sum(column) for column in zip(*counts, strict=True))
        size = size or max(1, _PREDICTIONS * samples // max(1, predictions))
        share = min(1.0, size * max(1, predictions) / samples / _ENOUGH)
        steps = math.ceil(len(self._trained) / size) * share
        return size, 1e-3 * math.sqrt(share), min(_MOST_PASSES, max(1, round(_STEPS / steps)))

    def train(self) -> Training:
        config, dense = self._config, self._dense
        held, trained = self._held, self._trained
        assert config.passes
        steps = math.ceil(len(trained) / self._batch_size)
        with (
            noting(lambda: _STOPPED, log.warning),  # Lightning does not show the notes of an interrupted run
            MaskedWeights(dense.model, self._parameters, dense.layers, self._processes) as weights,
            recomputing(dense.blocks),
            ProgressBar("Distilling", config.passes * (steps + 1), dense.progress) as bar,
        ):
            optimizer, schedule = self._optimizer(weights, config.passes * steps)
            lowest = self._mean_loss(held)
            passes, stopped = [TrainingPass(None, lowest)], ""
            try:
                for number in range(1, config.passes + 1):
                    losses = []
                    generator = torch.Generator().manual_seed(config.seed + number)
                    order = torch.randperm(len(trained), generator=generator).tolist()
                    for chosen in self._batches([trained[index] for index in order]):
                        bar.show(f"pass {number}")
                        losses.append(weights.step(optimizer, partial(self._losses, chosen, len(chosen))))
                        schedule.step()
                        bar.advance()
                    after = self._mean_loss(held)
                    if after is not None and not math.isfinite(after):
                        raise NotFiniteError("held-out loss")
                    passes.append(TrainingPass(sum(losses) / len(losses), after))
                    bar.advance()
                    if after is None or lowest is None or after < lowest:
                        lowest = after
                        weights.keep_best()
            except NotFiniteError as error:
                step = (len(passes) - 1) * steps + len(losses) + 1
                stopped = f"the {error} of step {step} was not finite, so training stopped: use a lower learning_rate"
        return Training(repr(config), len(trained), len(held), tuple(passes), stopped)

    def _batches(self, samples: Sequence[int]) -> Iterator[Sequence[int]]:
        return (samples[start : start + self._batch_size] for start in range(0, len(samples), self._batch_size))

    def _optimizer(self, weights: MaskedWeights, steps: int) -> tuple[Any, Any]:
        assert self._config.learning_rate
        groups = weights.groups(self._config.learning_rate)
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

        def factor(step: int) -> float:
            return min(1.0, (step + 1) / _WARM_UP) * (1 + math.cos(math.pi * min(1.0, step / steps))) / 2

        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

    def _losses(self, chosen: Sequence[int], count: int, scale: float | None) -> Iterator[float]:
        """Yield this process's parts of the mean loss over `count` samples, some of which are chosen."""
        for sample, target, size in self._own(chosen):
            yield self._loss(sample, target, size / count, scale)

    @torch.no_grad()
    def _mean_loss(self, chosen: Sequence[int]) -> float | None:
        """Return the mean loss over some samples; None if there are no samples."""

        def losses() -> Iterable[float]:
            for part in self._batches(chosen):
                yield from self._losses(part, len(chosen), None)

        total = sum_over_processes(losses, self._processes)
        return total if chosen else None

    def _own(self, chosen: Sequence[int]) -> list[tuple[Sample, DenseTarget, int]]:
        """Return the forward passes for the chosen samples of this process, each with its number of samples."""
        own = [own for index in chosen if (own := self._samples[index]) is not None]
        samples, targets = [sample for sample, _ in own], [target for _, target in own]
        fits = len(own) > 1 and all(len(target.rows) == 1 for target in targets) and fit_together(samples)
        if fits and len({target.head for target in targets}) == 1:
            rows = torch.cat([target.rows for target in targets])
            return [(self._dense.data.join(samples), DenseTarget(rows, targets[0].head), len(own))]
        return [(sample, target, 1) for sample, target in own]
