"""Learn the masks of a pruned model while it trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from statistics import fmean
from typing import Any, Literal

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from wanda_lightning.callbacks.dense import Dense, dense_model
from wanda_lightning.callbacks.keep_zeros import holders
from wanda_lightning.callbacks.moving_zeros import pattern_of, pruning_has_ended, refuse_at_start, refuse_in_setup
from wanda_lightning.callbacks.pruning import PruningCallback
from wanda_lightning.callbacks.run import result_of
from wanda_lightning.callbacks.trainer import last_step, pruning_target, shows_progress
from wanda_lightning.config import resolve_pattern
from wanda_lightning.core.hyperparameters import OneOf
from wanda_lightning.core.patterns import Pattern
from wanda_lightning.core.relaxation import Gates, PatternChoice, Relaxation
from wanda_lightning.learned_masks import LearnedLayer, LearnedMasks, MaskLearning
from wanda_lightning.models import Layer
from wanda_lightning.report import PrunedLayer
from wanda_lightning.report.metrics import Metric
from wanda_lightning.zeros import prunable_layers

_SCOPE = OneOf(("layer", "model"))


class LearnMasks(Callback):
    """Learn which weights of a pruned model are zero, from the end of pruning to the end of training.

    It starts from the masks of `PruningCallback` or `KeepZeros`, one of which the Trainer must have, and moves them by
    gradient descent on the loss of the module (see `LearnedMasks`). Each layer keeps its number of zeros, and N:M stays
    N:M. After every optimizer step the weights hold exact masks, so validation loops, checkpoints and the trained model
    see an ordinary pruned model.

    A weight that is zero at the start needs the value that it would have if it were kept: the one from before pruning
    if a `PruningCallback` prunes during the same training, else the one in `dense`.

    While masks are learned, each weight of a pruned layer takes memory for its value without the mask (2 or 4 bytes),
    a score (float16), two moments (bfloat16) and its mask: 9 to 11 GB for a billion weights, and almost as much in each
    checkpoint.

    Args:
        dense: The dense model, as for `DistillFromDense`. It is not needed if the model is pruned during the same
            training.
        pattern: The pattern that the masks keep, `"unstructured"` or N:M such as `"2:4"`. By default it is that of the
            `PruningCallback`; it is required if only `KeepZeros` holds the zeros.
        scope: Where the number of zeros is fixed: in each `"layer"`, or, for unstructured zeros, in the whole
            `"model"`.
        **choices: The attributes of `MaskLearning`: `travel`, `prior`, `temperature`, `noise`, `straight_through`,
            `train_weights` and `seed`.

    Raises:
        ValueError: If a value is out of range, or differs from a checkpoint. When training starts: if the pattern does
            not fit the masks, or `dense` has other layers.
        MisconfigurationException: When training starts: if Trainer and module do not allow that masks are learned.
    """

    def __init__(
        self,
        dense: Dense = None,
        pattern: str | Pattern | None = None,
        scope: Literal["layer", "model"] = "layer",
        **choices: Any,
    ) -> None:
        self.choices = MaskLearning(**choices)
        self.pattern = None if pattern is None else resolve_pattern(pattern)
        if not _SCOPE.accepts(scope):
            raise ValueError(f"scope of LearnMasks must be {_SCOPE}, but it is {scope!r}.")
        if self.pattern is not None:
            _refuse_scope(self.pattern, scope)
        self.dense, self.scope = dense, scope
        self._dense_values: dict[str, Tensor] = {}
        self._masks: LearnedMasks | None = None
        self._first_step = 0
        self._loaded: Mapping[str, Any] | None = None
        self._is_applied = self._has_learned = False
        self._results: list[tuple[Metric, float]] = []

    @property
    def moved(self) -> dict[str, float]:
        """For each layer, the fraction of the weights of its start mask that are zero now; empty before the start."""
        return {} if self._masks is None else self._masks.moved()

    @property
    def learns(self) -> bool:
        """Whether masks are being learned, also in a run that is about to be resumed."""
        return self._masks is not None or bool(self._loaded and self._loaded["layers"])

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a Trainer or module with which masks cannot be learned, and read the dense model."""
        if stage != "fit":
            return
        refuse_in_setup(trainer, pl_module, type(self).__name__)
        self._masks, self._loaded, self._dense_values, self._results = None, None, {}, []
        self._is_applied = self._has_learned = False
        if self.dense is not None:
            self._remember(dense_model(self.dense, pl_module))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse a Trainer that leaves no steps to learn masks in."""
        refuse_at_start(trainer, type(self).__name__)

    def before_pruning(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember the weights; `PruningCallback` calls it."""
        self._remember(pruning_target(pl_module))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start if pruning has ended, and write a sample of the masks into the model."""
        if self._masks is None and pruning_has_ended(trainer):
            self._start(trainer, pl_module)
        if self._masks is not None and not self._is_applied:
            self._masks.apply(trainer.global_step, self._progress(trainer))
            self._is_applied = True

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Update the scores by the gradients, and prepare the weights for the optimizer."""
        if self._masks is None:
            return
        _refuse_no_gradients(self._masks)
        self._masks.learn(trainer.global_step, self._progress(trainer), self._steps(trainer))
        if not self.choices.train_weights:
            for parameter in pl_module.parameters():
                parameter.grad = None
        self._has_learned = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an optimizer step, write the exact masks into the model."""
        if self._masks is not None and self._has_learned:
            self._masks.settle()
            self._is_applied = self._has_learned = False

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let a checkpoint hold exact masks, also while gradients accumulate."""
        self.on_validation_start(trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let a validation loop between two steps see exact masks, also while gradients accumulate."""
        if self._masks is not None and self._is_applied:
            self._masks.restore()
            self._is_applied = False

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the result, to report what the masks gained."""
        if self._masks is not None and (result := result_of(trainer)):
            self._results.append(result)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave exact masks in the model, and report how far they have moved."""
        if self._masks is None:
            return
        moved = self._masks.moved()
        summary = self._summary(trainer.global_step - self._first_step, moved)
        if shows_progress(trainer):
            rank_zero_info(summary)
        layers = {each.layer.name: each.layer for each in self._masks.layers}
        for callback, _ in holders(trainer):
            if isinstance(callback, PruningCallback) and callback.report is not None:
                pruned = [
                    _with_moved(each, layers[each.name], moved)
                    for each in callback.report.layers
                    if each.name in layers
                ]
                callback.masks_have_moved(trainer, summary, pruned)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave exact masks in the model."""
        if self._masks is not None and self._has_learned:
            self._masks.settle()
        elif self._masks is not None:
            self._masks.restore()
        self._is_applied = self._has_learned = False

    def state_dict(self) -> dict[str, Any]:
        """Return the choices and the state of each layer, as plain data and tensors."""
        layers = {} if self._masks is None else self._masks.state_dict()
        return {**self._fixed_choices, "first_step": self._first_step, "layers": layers, "dense": self._dense_values}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state; refuse that of a run with other choices."""
        saved = {name: state_dict[name] for name in self._fixed_choices}
        if saved != self._fixed_choices:
            raise ValueError(
                f"LearnMasks must have the choices of the checkpoint, {saved}, but it has {self._fixed_choices}. Use "
                "the same, or load only the weights in a new run."
            )
        self._loaded = state_dict
        self._dense_values = state_dict["dense"]

    @property
    def _fixed_choices(self) -> dict[str, Any]:
        """The choices that a resumed run must not change."""
        choices = {
            name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self.choices).items()
        }
        return {"choices": choices, "pattern": repr(self.pattern), "scope": self.scope}

    @torch.no_grad()
    def _remember(self, model: nn.Module) -> None:
        """Store the weights of all prunable layers, except that zeros do not replace earlier values."""
        for layer in prunable_layers(model):
            weight, known = layer.read(), self._dense_values.get(layer.name)
            self._dense_values[layer.name] = (
                weight.clone() if known is None else torch.where(weight != 0, weight, known)
            )

    def _progress(self, trainer: L.Trainer) -> float:
        """Return which fraction of the steps is done, from 0 at the first to 1 at the last one."""
        return min(1.0, (trainer.global_step - self._first_step) / max(1.0, self._steps(trainer) - 1))

    def _steps(self, trainer: L.Trainer) -> float:
        """Return the number of steps in which masks are learned."""
        return last_step(trainer) - self._first_step

    def _start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the layers over from the callbacks that hold their zeros."""
        loaded, self._loaded = self._loaded or {}, None
        self._first_step = (
            loaded.get("first_step", trainer.global_step) if loaded.get("layers") else trainer.global_step
        )
        groups: list[tuple[Relaxation, list[LearnedLayer]]] = []
        for callback, zeros in holders(trainer):
            pattern = pattern_of(callback, self.pattern, type(self).__name__)
            found = [self._layer(layer, keep, loaded.get("layers", {})) for layer, keep in zeros.masks()]
            groups += _groups(found, pattern, self.scope)
            zeros.release()
        if not groups:
            raise MisconfigurationException(
                "LearnMasks starts from zeros that PruningCallback(keep_zeros=True) or KeepZeros() holds, but neither "
                "of them holds any. Prune the model, or load pruned weights."
            )
        self._masks, self._dense_values = LearnedMasks(self.choices, groups), {}

    def _layer(self, layer: Layer, keep: Tensor, loaded: Mapping[str, Mapping[str, Tensor]]) -> LearnedLayer:
        if layer.name in loaded:
            return LearnedLayer.resume(layer, loaded[layer.name])
        dense = self._dense_values.get(layer.name)
        if dense is None or dense.shape != keep.shape:
            found = (
                "is not known"
                if dense is None
                else f"has the shape {tuple(dense.shape)} instead of {tuple(keep.shape)}"
            )
            raise ValueError(
                f"dense of LearnMasks must have the values of the zeros of {layer.name}, but this layer {found} there. "
                "Give the dense model from which this one was pruned."
            )
        return LearnedLayer.begin(layer, keep, dense.to(keep.device), self.choices.prior)

    def _summary(self, steps: int, moved: Mapping[str, float]) -> str:
        text = (
            f"LearnMasks moved {fmean(moved.values()):.2%} of the kept weights of a layer in {steps:,} steps "
            f"({min(moved.values()):.2%} to {max(moved.values()):.2%})."
        )
        if len(self._results) < 2:
            return text
        (metric, before), (_, after) = self._results[0], self._results[-1]
        return f"{text} {metric.title} in validation: {metric.text(before)} at first, {metric.text(after)} at the end."


def _with_moved(pruned: PrunedLayer, layer: Layer, moved: Mapping[str, float]) -> PrunedLayer:
    """Return what the report says of a layer, with its zeros now and how many have moved."""
    note = "; ".join(filter(None, (pruned.note, f"{moved[pruned.name]:.2%} of the kept weights moved")))
    return replace(pruned, sparsity=float((layer.weight == 0).float().mean()), note=note)


def _groups(layers: list[LearnedLayer], pattern: Pattern, scope: str) -> list[tuple[Relaxation, list[LearnedLayer]]]:
    """Return the layers that share a number of zeros, with the relaxation that keeps the number and the pattern."""
    if size := pattern.group_size:
        _refuse_scope(pattern, scope)
        return [(_choice_of(layer, size), [layer]) for layer in layers]
    parts = [[layer] for layer in layers] if scope == "layer" or not layers else [layers]
    return [(Gates(sum(int(each.first_keep().sum()) for each in part)), part) for part in parts]


def _refuse_scope(pattern: Pattern, scope: str) -> None:
    if pattern.group_size and scope == "model":
        raise ValueError(
            f"scope='model' moves zeros between layers, which pattern={pattern} does not allow. Use scope='layer'."
        )


def _choice_of(layer: LearnedLayer, size: int) -> PatternChoice:
    """Return the choice of patterns for a layer, whose N may differ from that of other layers."""
    keep = layer.first_keep()
    kept = keep.reshape(-1, size).sum(dim=1) if keep.numel() % size == 0 else keep.new_zeros(1)
    n = int(kept[0])
    if not 0 < n < size or (kept != n).any():
        raise ValueError(
            f"pattern of LearnMasks must be that of the zeros, but {layer.layer.name} does not keep the same number in "
            f"every group of {size}. Give the pattern with which the model was pruned, or pattern='unstructured'."
        )
    return PatternChoice(n, size)


def _refuse_no_gradients(masks: LearnedMasks) -> None:
    """Raise an error if the loss depends on none of the layers."""
    if not any((gradient := layer.gradient()) is not None and gradient.any() for layer in masks.layers):
        raise MisconfigurationException(
            "LearnMasks needs a loss that depends on the pruned layers, but the gradients of all of them, "
            f"{masks.layers[0].layer.name} first, are zero or missing. Check training_step."
        )
