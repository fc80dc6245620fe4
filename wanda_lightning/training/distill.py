"""Train the kept weights of the whole pruned model to predict like the dense model."""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import nn
from torch.nn import Module

from wanda_lightning.calibration.error_notes import note_on_error
from wanda_lightning.calibration.recomputing import recomputing
from wanda_lightning.calibration.samples import Sample, fit_together
from wanda_lightning.common.checks import COUNT, SEED, Number, check
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.progress import ProgressBar
from wanda_lightning.models import Stop, causal_config
from wanda_lightning.parallel import Processes
from wanda_lightning.report import Training
from wanda_lightning.training.masked_weights import MaskedWeights, hold_out
from wanda_lightning.training.predictions import (
    HELD_OUT,
    DenseTarget,
    DistillLoss,
    dense_targets,
    output_head,
)
from wanda_lightning.training.reconstruct import Reconstruct
from wanda_lightning.training.recovery import BlockRecovery, DenseModel, ModelRecovery, Recovery

log = logging.getLogger(__name__)

_WARM_UP = 4  # optimizer steps
_PREDICTIONS = 8  # in an optimizer step, at least; a window of text has one for each token, an image a single one
_ENOUGH = 512  # predictions in a step for the largest usual learning rate
_STEPS = 48  # optimizer steps of `_ENOUGH` predictions that the default number of passes aims at
_MOST_PASSES = 3  # by default
_STOPPED = (
    "The model is pruned. It holds the best weights that distillation found before it was stopped."
)


@dataclass(frozen=True)
class Distill(Recovery):
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

    reads_batches = True

    def __post_init__(self) -> None:
        rules = {"passes": COUNT, "batch_size": COUNT, "learning_rate": Number(above=0, maximum=1)}
        given = {name: rule for name, rule in rules.items() if getattr(self, name) is not None}
        check(self, loss=("kl", "mse", None), blocks=(True, False, None), **given)
        check(self, seed=SEED, next_token=Number(minimum=0, maximum=1))

    @property
    def trains_blocks(self) -> bool:
        """Whether it trains each block."""
        return bool(self.blocks)

    def for_model(self, is_image: bool, sequential: str) -> Recovery:
        """Decide about `blocks=None`."""
        if self.blocks is not None:
            return self
        return replace(self, blocks=is_image and sequential != "layer")

    def start(self, stop: Stop, processes: Processes) -> BlockRecovery:
        """Start to train a block."""
        return Reconstruct().start(stop, processes) if self.blocks else BlockRecovery()

    def run_dense_model(self, dense: DenseModel) -> ModelRecovery:
        """Run the dense model on all samples, and store its predictions."""
        processes = dense.processes
        head = output_head(dense.model, dense.layers)
        parameters = _trainable(dense, head)
        batches = _run_samples(dense, head)
        dense.data.refuse_if_empty()  # which is known now: the batches may come from a generator
        trained, held_out = hold_out(batches, HELD_OUT, processes)

        items = [item for batch in batches for item in batch]
        first = items[0].sample if items else None
        settings = _settings(self, items, len(trained), processes)
        loss = DistillLoss(dense.model, self.loss, self.next_token, causal_config(dense.model))
        loss = loss.in_supported_precision(first, processes)
        return _Distillation(dense, self, settings, parameters, trained, held_out, loss)


@dataclass(frozen=True)
class _Item:
    """A sample, or several that run as one batch, and what the dense model predicts."""

    sample: Sample
    target: DenseTarget
    count: int = 1  # of samples


_Items = Sequence[_Item | None]  # None for a sample of another process


def _run_samples(dense: DenseModel, head: Module | None) -> list[list[_Item]]:
    """Return the samples of each batch of this process with the predictions of the dense model."""
    batches = []
    data = dense.data
    with (
        ProgressBar("Predicting", data.length, dense.progress) as bar,
        recomputing(dense.blocks),
        dense.processes.fail_together(),
    ):
        for batch in data:
            samples = data.split(batch)
            batches.append([*map(_Item, samples, dense_targets(samples, data, head))])
            bar.advance()
    return batches


class _Settings(NamedTuple):
    """The settings that `Distill` may leave open, as they were given or chosen."""

    batch_size: int
    passes: int
    learning_rate: float


def _settings(
    config: Distill, items: Sequence[_Item], num_trained: int, processes: Processes
) -> _Settings:
    """Choose the settings by the number of samples and predictions of all processes."""
    # Of all processes, which must take the same steps.
    totals = torch.tensor([len(items), sum(len(item.target.rows) for item in items)])
    processes.all_reduce_sum([totals])
    samples, predictions = totals.tolist()
    batch_size = config.batch_size or max(1, _PREDICTIONS * samples // max(1, predictions))
    # The gradients of few predictions are noisy, so such steps are smaller, and more of them are needed.
    steps = math.ceil(num_trained / batch_size)
    fullness = min(1.0, batch_size * max(1, predictions) / samples / _ENOUGH)
    passes = config.passes or min(_MOST_PASSES, max(1, round(_STEPS / (steps * fullness))))
    return _Settings(batch_size, passes, config.learning_rate or 1e-3 * math.sqrt(fullness))


@dataclass(frozen=True)
class _Distillation(ModelRecovery):
    """Trains a model toward the predictions that it made before it was pruned.

    Each process runs only its own samples, and all apply the same steps.
    """

    dense: DenseModel
    config: Distill
    settings: _Settings
    parameters: Sequence[nn.Parameter]
    trained: _Items
    held_out: _Items
    loss: DistillLoss

    def train(self) -> Training:
        """Take the steps of all passes."""
        dense = self.dense
        settings = self.settings
        passes = range(1, settings.passes + 1)
        steps = settings.passes * math.ceil(len(self.trained) / settings.batch_size)
        # Lightning does not show the notes of an interrupted run.
        with (
            note_on_error(lambda: _STOPPED, log.warning),
            MaskedWeights(dense.model, self.parameters, dense.layers, dense.processes) as weights,
            recomputing(dense.blocks),
            ProgressBar("Distilling", steps, dense.progress) as bar,
        ):
            groups = weights.groups(settings.learning_rate)
            optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
            share_of_rate = partial(_share_of_rate, steps=steps)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_rate)

            def steps_of(number: int) -> Iterator[_Items]:
                for batch in self._batches(self._shuffled(number)):
                    bar.show(f"pass {number}")
                    yield batch  # `fit` takes a step of the optimizer before it asks for the next batch
                    schedule.step()
                    bar.advance()

            losses, stopped = weights.fit(
                optimizer, map(steps_of, passes), self.held_out, self._mean_loss
            )
        if stopped:
            stopped += ", so training stopped: use a lower learning_rate"
        config = replace(self.config, passes=settings.passes, learning_rate=settings.learning_rate)
        return Training(repr(config), len(self.trained), len(self.held_out), tuple(losses), stopped)

    def _shuffled(self, number: int) -> list[_Item | None]:
        """Return the samples in the order of a pass."""
        generator = torch.Generator().manual_seed(self.config.seed + number)
        order = torch.randperm(len(self.trained), generator=generator).tolist()
        return [self.trained[index] for index in order]

    def _batches(self, samples: _Items) -> Iterator[_Items]:
        size = self.settings.batch_size
        return (samples[start : start + size] for start in range(0, len(samples), size))

    def _mean_loss(self, samples: _Items, scale: float | None) -> Iterator[float]:
        """Yield this process's parts of the mean loss over samples."""
        for batch in self._batches(samples):
            for item in self._joined(batch):
                yield self.loss(item.sample, item.target, item.count / len(samples), scale)

    def _joined(self, batch: _Items) -> list[_Item]:
        """Return the samples of this process in a batch; as one item if they have one prediction each and fit."""
        items = [item for item in batch if item]
        samples = [item.sample for item in items]
        targets = [item.target for item in items]
        heads = {target.head for target in targets}
        have_one_prediction = all(len(target.rows) == 1 for target in targets)
        if len(items) < 2 or len(heads) > 1 or not have_one_prediction or not fit_together(samples):
            return items

        rows = torch.cat([target.rows for target in targets])
        return [_Item(self.dense.data.join(samples), DenseTarget(rows, heads.pop()), len(items))]


def _share_of_rate(step: int, steps: int) -> float:
    """Return the share of the learning rate in a step: it warms up, and decays to 0 along a cosine."""
    warm_up = min(1.0, (step + 1) / _WARM_UP)
    return warm_up * (1 + math.cos(math.pi * min(1.0, step / steps))) / 2


def _trainable(dense: DenseModel, head: Module | None) -> list[nn.Parameter]:
    """Return the parameters of the pruned layers and all vectors, without those of the head."""
    pruned = {layer.parameter for layer in dense.layers}
    # The dense predictions are stored as inputs of the head, which must not change.
    fixed = set() if head is None else set(head.parameters())
    trainable = []
    for parameter in dense.model.parameters():
        may_train = parameter in pruned or parameter.ndim < 2
        if may_train and parameter.requires_grad and parameter not in fixed:
            trainable.append(parameter)
    if not trainable:
        raise UserError(
            "recovery=Distill() trains the pruned layers and all vectors, but requires_grad is False for each of them. "
            "Call requires_grad_() on the parameters to train, or use another recovery."
        )
    return trainable
