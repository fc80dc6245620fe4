"""Train the kept weights of the whole pruned model to predict like the dense model."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from wanda_lightning.calibration.error_notes import noting
from wanda_lightning.calibration.gradients import recomputing
from wanda_lightning.calibration.samples import Sample, fit_together
from wanda_lightning.common.checks import SEED, Number, check, check_flags
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.progress import ProgressBar
from wanda_lightning.models import Unit
from wanda_lightning.parallel import SINGLE_PROCESS, Processes
from wanda_lightning.report import Training
from wanda_lightning.training.masked_weights import Losses, MaskedWeights, in_one_order, sum_over_processes
from wanda_lightning.training.predictions import HELD_OUT, DenseTarget, DistilLoss, dense_targets, output_head
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

    After all layers are pruned, AdamW minimizes the Kullback-Leibler divergence from the dense to the pruned model's
    predictions (Hinton et al. 2015, temperature 1), averaged over the tokens of each sample. The masks are fixed. The
    weights of the pruned layers and all vectors (norms, biases, layer scales) are trained; embeddings, head and other
    dense layers are not. The learning rate warms up over four steps and decays to 0 along a cosine.

    If there are at least eight samples, over all processes, every eighth is held out, and the weights with the lowest
    held-out loss are kept, which may be those from before training. With fewer samples, the weights of the last pass
    are kept. If a loss or gradient is NaN or infinite, or on Ctrl-C, training stops and the best weights so far are
    kept; the report or a log message says so.

    A sample is one entry of the first dimension of a batch, and runs by itself. If the model expects another dimension
    first, such as time, give batches with samples first and let `forward=` rearrange them. A batch is one sample if its
    tensors differ in length, or if its entries have other predictions alone than together.

    The dense predictions are computed from the stored inputs of the output head, or are stored themselves. Blocks are
    recomputed in the backward pass, except those that write into their arguments or receive an object with tensors,
    such as a key-value cache. Models in float32 run in bfloat16 (autocast) where the hardware and the code of the model
    support it. Weights in bfloat16 and float16 are trained as copies in float32.

    Attributes:
        passes: Number of passes over the samples. None chooses 1 to 3, for about 48 steps of 512 predictions: 3 passes
            over 16 windows of at least 512 tokens, 2 over 32, 1 over 64 or more; 3 for up to about 10,000 images.
        learning_rate: Largest learning rate of AdamW, relative to the root mean square of a tensor's kept weights. None
            chooses `0.001 * sqrt(min(n, 512) / 512)` for n predictions in a step, since the gradients of few are noisy
            (Malladi et al. 2022).
        batch_size: Number of samples in an optimizer step, over all processes. None chooses as many as have 8
            predictions: one window of at least 8 tokens, or 8 images. Samples with one prediction and equal shapes
            run as one batch.
        loss: `"kl"`, or `"mse"` for the mean squared error of the outputs; None chooses `"kl"` for outputs of shape
            (samples, classes) and for `logits` of shape (samples, tokens, classes) or (samples, classes, height,
            width), and `"mse"` for all others.
        next_token: Share of the loss that is the cross entropy of the next token, in [0, 1]; the rest is the
            divergence. It applies to causal language models of transformers whose batches hold `input_ids`, but not
            with `"mse"`.
        seed: Seed of the order of the samples.
        blocks: Whether to train each block for its own output right after it is pruned, as `Reconstruct` does. With
            None, blocks are trained in image models, except with `sequential="layer"` or patterns of hidden units.
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
        rules: dict[str, Any] = {
            "passes": at_least_1,
            "learning_rate": Number(above=0, maximum=1),
            "batch_size": at_least_1,
            "loss": ("kl", "mse"),
        }
        given = {name: rule for name, rule in rules.items() if getattr(self, name) is not None}
        check(self, seed=SEED, next_token=Number(minimum=0, maximum=1), **given)
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
        self._batch_size, self._rate, self._passes = self._usual(config)
        self._config = replace(config, passes=self._passes, learning_rate=self._rate)

    def _usual(self, config: Distil) -> tuple[int, float, int]:
        """Return the size of a step, its learning rate, and the number of passes, as given or chosen.

        The chosen size is the smallest with enough predictions. The number of predictions of a sample is the mean over
        all processes.
        """
        rows = [len(target.rows) for _, target in filter(None, self._samples)]
        counts = self._processes.all_gather([len(rows), sum(rows)])
        samples, predictions = (sum(column) for column in zip(*counts, strict=True))
        size = config.batch_size or max(1, _PREDICTIONS * samples // max(1, predictions))
        share = min(1.0, size * max(1, predictions) / samples / _ENOUGH)
        passes = round(_STEPS / (math.ceil(len(self._trained) / size) * share))
        rate = config.learning_rate or 1e-3 * math.sqrt(share)
        return size, rate, config.passes or min(_MOST_PASSES, max(1, passes))

    def train(self) -> Training:
        dense, trained = self._dense, self._trained
        steps = self._passes * math.ceil(len(trained) / self._batch_size)
        with (
            noting(lambda: _STOPPED, log.warning),  # Lightning does not show the notes of an interrupted run
            MaskedWeights(dense.model, self._parameters, dense.layers, self._processes) as weights,
            recomputing(dense.blocks),
            ProgressBar("Distilling", steps, dense.progress) as bar,
        ):
            groups = weights.groups(self._rate)
            optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

            def factor(step: int) -> float:
                return min(1.0, (step + 1) / _WARM_UP) * (1 + math.cos(math.pi * min(1.0, step / steps))) / 2

            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

            def steps_of(number: int) -> Iterator[Losses]:
                generator = torch.Generator().manual_seed(self._config.seed + number)
                order = torch.randperm(len(trained), generator=generator).tolist()
                for chosen in self._batches([trained[index] for index in order]):
                    bar.show(f"pass {number}")
                    yield partial(self._losses, chosen, len(chosen))
                    schedule.step()
                    bar.advance()

            passes, stopped = weights.fit(optimizer, map(steps_of, range(1, self._passes + 1)), self._held_out_loss)
        stopped = stopped and f"{stopped}, so training stopped: use a lower learning_rate"
        return Training(repr(self._config), len(trained), len(self._held), tuple(passes), stopped)

    def _batches(self, samples: Sequence[int]) -> Iterator[Sequence[int]]:
        return (samples[start : start + self._batch_size] for start in range(0, len(samples), self._batch_size))

    def _losses(self, chosen: Sequence[int], count: int, scale: float | None) -> Iterator[float]:
        """Yield this process's parts of the mean loss over `count` samples, some of which are chosen."""
        for sample, target, size in self._own(chosen):
            yield self._loss(sample, target, size / count, scale)

    @torch.no_grad()
    def _held_out_loss(self) -> float | None:
        held = self._held
        total = sum_over_processes(
            lambda: (loss for part in self._batches(held) for loss in self._losses(part, len(held), None)),
            self._processes,
        )
        return total if held else None

    def _own(self, chosen: Sequence[int]) -> list[tuple[Sample, DenseTarget, int]]:
        """Return the forward passes for the chosen samples of this process, each with its number of samples."""
        own = [own for index in chosen if (own := self._samples[index]) is not None]
        samples, targets = [sample for sample, _ in own], [target for _, target in own]
        fits = len(own) > 1 and all(len(target.rows) == 1 for target in targets) and fit_together(samples)
        if fits and len({target.head for target in targets}) == 1:
            rows = torch.cat([target.rows for target in targets])
            return [(self._dense.data.join(samples), DenseTarget(rows, targets[0].head), len(own))]
        return [(sample, target, 1) for sample, target in own]
