"""Train the kept weights of the whole pruned model to predict like the dense model."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from wanda_lightning.calibration.error_notes import note_on_error
from wanda_lightning.calibration.recomputing import recomputing
from wanda_lightning.calibration.samples import Sample, fit_together
from wanda_lightning.common.checks import SEED, Number, check, check_flags
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.progress import ProgressBar
from wanda_lightning.models import Stop
from wanda_lightning.parallel import SINGLE_PROCESS, Processes
from wanda_lightning.report import Training
from wanda_lightning.training.predictions import (
    HELD_OUT,
    DenseTarget,
    DistilLoss,
    dense_targets,
    output_head,
)
from wanda_lightning.training.reconstruct import Reconstruct
from wanda_lightning.training.recovery import (
    BlockRecovery,
    DenseModel,
    MaskedWeights,
    ModelRecovery,
    Recovery,
    hold_out,
)

log = logging.getLogger(__name__)

_WARM_UP = 4  # optimizer steps
_PREDICTIONS = 8  # in an optimizer step, at least; a window of text has one for each token, an image a single one
_ENOUGH = 512  # predictions in a step for the largest usual learning rate
_STEPS = 48  # optimizer steps of `_ENOUGH` predictions that the default number of passes aims at
_MOST_PASSES = 3  # by default
_Item = tuple[Sample, DenseTarget] | None  # None for a sample of another process
_STOPPED = (
    "The model is pruned. It holds the best weights that distillation found before it was stopped."
)


@dataclass(frozen=True)
class Distil(Recovery):
    """Train the kept weights so that the pruned model predicts like the dense model on the calibration samples.

    After all layers are pruned, AdamW minimizes the Kullback-Leibler divergence from the dense to the pruned model's
    predictions (Hinton et al. 2015, temperature 1), averaged over the tokens of each sample. It trains the kept weights
    and all vectors (norms, biases, layer scales), but no embeddings, head and other dense layers. The learning rate
    warms up over four steps and decays to 0 along a cosine.

    If there are at least eight samples, over all processes, every eighth is held out, and the weights with the lowest
    held-out loss are kept, which may be those from before training. Otherwise, the weights of the last pass are kept.
    If a loss or gradient is NaN or infinite, or on Ctrl-C, training stops and the best weights so far are kept; the
    report or a log message says so.

    A sample is one entry of the first dimension of a batch. A batch is one sample if its tensors differ in length, or
    if its entries have other predictions alone than together, as when time comes first: then give batches with samples
    first and let `forward=` rearrange them. The dense predictions are stored, or the inputs of the output head.

    Blocks are recomputed in the backward pass, except those that write into their arguments or receive an object with
    tensors, such as a key-value cache. Models in float32 run in bfloat16 (autocast) where the hardware and the code of
    the model support it. Weights in bfloat16 and float16 are trained as copies in float32.

    Attributes:
        passes: Number of passes over the samples. None chooses 1 to 3, for about 48 steps of 512 predictions: 3 over 16
            windows of at least 512 tokens, 2 over 32, 1 over 64 or more; 3 for up to about 10,000 images.
        learning_rate: Largest learning rate of AdamW, relative to the root mean square of a tensor's kept weights. None
            chooses `0.001 * sqrt(min(n, 512) / 512)` for n predictions in a step, since the gradients of few are noisy
            (Malladi et al. 2022).
        batch_size: Number of samples in an optimizer step, over all processes. None chooses as many as have 8
            predictions: one window of text, or 8 images. Samples with one prediction and equal shapes run as one batch.
        loss: `"kl"`, or `"mse"` for the mean squared error of the outputs. None chooses `"kl"` for outputs (samples,
            classes), and for `logits` (samples, tokens, classes) or (samples, classes, height, width), else `"mse"`.
        next_token: Share of the loss that is the cross entropy of the next token, in [0, 1]; the rest is the
            divergence. It applies with `"kl"` to causal language models of transformers, if batches hold `input_ids`.
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
        rules: dict[str, Any] = dict.fromkeys(
            ("passes", "batch_size"), Number(minimum=1, whole=True)
        )
        rules |= {"learning_rate": Number(above=0, maximum=1), "loss": ("kl", "mse")}
        given = {name: rule for name, rule in rules.items() if getattr(self, name) is not None}
        check(self, seed=SEED, next_token=Number(minimum=0, maximum=1), **given)
        if self.blocks is not None:
            check_flags(blocks=self.blocks)

    @property
    def trains_blocks(self) -> bool:
        """Whether it trains each block."""
        return bool(self.blocks)

    def for_model(self, is_image: bool, sequential: str) -> Recovery:
        """Decide about `blocks=None`."""
        return (
            replace(self, blocks=is_image and sequential != "layer")
            if self.blocks is None
            else self
        )

    def start(self, stop: Stop, processes: Processes = SINGLE_PROCESS) -> BlockRecovery:
        """Start to train a block."""
        return Reconstruct().start(stop, processes) if self.blocks else BlockRecovery()

    def start_model(self, dense: DenseModel) -> ModelRecovery:
        """Store the predictions of the dense model."""
        return _Distillation(self, dense)


class _Distillation(ModelRecovery):
    """Trains a model toward the predictions that it made before it was pruned.

    Each process runs only its own samples, and all apply the same steps.
    """

    def __init__(self, config: Distil, dense: DenseModel) -> None:
        self._dense = dense
        processes = dense.processes
        head = output_head(dense.model, dense.layers)
        self._parameters = _trainable(dense, head)
        batches = []
        with (
            ProgressBar("Predicting", dense.data.length, dense.progress) as bar,
            recomputing(dense.model, dense.blocks),
            processes.fail_together(),
        ):
            for samples in map(dense.data.split, dense.data):
                batches.append(
                    [*zip(samples, dense_targets(samples, dense.data, head), strict=True)]
                )
                bar.advance()
        dense.data.refuse_if_empty()
        self._trained, self._held_out = hold_out(batches, HELD_OUT, processes)
        own = [each for batch in batches for each in batch]
        self._batch_size, self._passes, self._rate = self._usual(
            config, [target for _, target in own]
        )
        self._config = replace(config, passes=self._passes, learning_rate=self._rate)
        first = own[0][0] if own else None
        self._loss = DistilLoss(dense.model, config.loss, config.next_token, first, processes)

    def _usual(self, config: Distil, targets: Sequence[DenseTarget]) -> tuple[int, int, float]:
        """Return the size of a step, the number of passes and the learning rate, as given or chosen."""
        counts = self._dense.processes.all_gather(
            [len(targets), sum(len(target.rows) for target in targets)]
        )
        samples, predictions = (sum(column) for column in zip(*counts, strict=True))
        size = config.batch_size or max(1, _PREDICTIONS * samples // max(1, predictions))
        share = min(1.0, size * max(1, predictions) / samples / _ENOUGH)
        passes = min(
            _MOST_PASSES, max(1, round(_STEPS / (math.ceil(len(self._trained) / size) * share)))
        )
        return size, config.passes or passes, config.learning_rate or 1e-3 * math.sqrt(share)

    def train(self) -> Training:
        dense = self._dense
        trained = self._trained
        passes = range(1, self._passes + 1)
        steps = len(passes) * math.ceil(len(trained) / self._batch_size)
        # Lightning does not show the notes of an interrupted run.
        with (
            note_on_error(lambda: _STOPPED, log.warning),
            MaskedWeights(dense.model, self._parameters, dense.layers, dense.processes) as weights,
            recomputing(dense.model, dense.blocks),
            ProgressBar("Distilling", steps, dense.progress) as bar,
        ):
            optimizer = torch.optim.AdamW(
                weights.groups(self._rate), betas=(0.9, 0.95), weight_decay=0.0, fused=True
            )

            def factor(step: int) -> float:
                return (
                    min(1.0, (step + 1) / _WARM_UP)
                    * (1 + math.cos(math.pi * min(1.0, step / steps)))
                    / 2
                )

            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

            def steps_of(number: int) -> Iterator[Sequence[_Item]]:
                generator = torch.Generator().manual_seed(self._config.seed + number)
                order = torch.randperm(len(trained), generator=generator).tolist()
                for chosen in self._batches([trained[index] for index in order]):
                    bar.show(f"pass {number}")
                    yield chosen
                    schedule.step()
                    bar.advance()

            found, stopped = weights.fit(
                optimizer, map(steps_of, passes), self._held_out, self._mean_loss
            )
        stopped = stopped and f"{stopped}, so training stopped: use a lower learning_rate"
        return Training(
            repr(self._config), len(trained), len(self._held_out), tuple(found), stopped
        )

    def _batches(self, samples: Sequence[_Item]) -> Iterator[Sequence[_Item]]:
        return (
            samples[start : start + self._batch_size]
            for start in range(0, len(samples), self._batch_size)
        )

    def _mean_loss(self, samples: Sequence[_Item], scale: float | None) -> Iterator[float]:
        """Yield this process's parts of the mean loss over samples."""
        for chosen in self._batches(samples):
            for sample, target, size in self._own(chosen):
                yield self._loss(sample, target, size / len(samples), scale)

    def _own(self, chosen: Sequence[_Item]) -> list[tuple[Sample, DenseTarget, int]]:
        """Return the forward passes for the chosen samples of this process, each with its number of samples."""
        own = [*filter(None, chosen)]
        samples = [sample for sample, _ in own]
        targets = [target for _, target in own]
        fits = (
            len(own) > 1
            and all(len(target.rows) == 1 for target in targets)
            and fit_together(samples)
        )
        if fits and len({target.head for target in targets}) == 1:
            rows = torch.cat([target.rows for target in targets])
            return [(self._dense.data.join(samples), DenseTarget(rows, targets[0].head), len(own))]
        return [(sample, target, 1) for sample, target in own]


def _trainable(dense: DenseModel, head: nn.Module | None) -> list[nn.Parameter]:
    """Return the parameters of the pruned layers and all vectors, without those of the head."""
    pruned = {id(layer.parameter) for layer in dense.layers}
    fixed = {id(parameter) for parameter in head.parameters()} if head is not None else set()
    found = [
        parameter
        for parameter in dense.model.parameters()
        if parameter.requires_grad
        and id(parameter) not in fixed
        and not isinstance(parameter, UninitializedParameter)
        and (id(parameter) in pruned or parameter.ndim < 2)
    ]
    if not found:
        raise UserError(
            "recovery=Distil() trains the pruned layers and all vectors, but requires_grad is False for each of them. "
            "Call requires_grad_() on the parameters to train, or use another recovery."
        )
    return found
