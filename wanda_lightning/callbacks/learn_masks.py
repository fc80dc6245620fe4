"""Learn the masks of a pruned model while it trains."""

from __future__ import annotations

import weakref
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
from wanda_lightning.callbacks.moving_zeros import (
    pattern_of,
    pruning_has_ended,
    refuse_at_start,
    refuse_held,
    refuse_in_setup,
)
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
_ALIKE = 0.3  # cosine of kept and dense weights, at least; about 0 in another order, above 0.9 after our solvers
_EXACT = 0.8  # fraction of the groups of N:M that keep exactly N, at least


class LearnMasks(Callback):
    """Learn which weights of a pruned model are zero, from the end of pruning to the end of training.

    It starts from the masks of `PruningCallback` or `KeepZeros`, one of which the Trainer must have, and moves them by
    gradient descent on the loss of the module (see `LearnedMasks`). Each layer keeps its number of zeros, and N:M stays
    N:M. After every batch the weights hold exact masks, so validation loops, checkpoints and the trained model see an
    ordinary pruned model.

    A weight that is zero at the start needs the value that it would have if it were kept: the one from before pruning
    if a `PruningCallback` prunes during the same training, else the one in `dense`.

    While masks are learned, each weight of a pruned layer takes memory for its value without the mask (2 or 4 bytes),
    a score (float32), two moments (bfloat16) and its mask: 11 to 13 GB for a billion weights, and almost as much in
    each checkpoint.

    Args:
        dense: The dense model, as for `DistillFromDense`. It is not needed if the model is pruned during the same
            training.
        pattern: The pattern of the zeros that `KeepZeros` holds, `"unstructured"` or N:M such as `"2:4"`. The pattern
            of a `PruningCallback` is known.
        scope: Where the number of zeros is fixed: in each `"layer"`, or, for unstructured zeros, in all layers together
            that a callback holds (`"model"`), which needs memory for two copies of all scores in each step.
        **choices: The attributes of `MaskLearning`: `travel`, `prior`, `temperature`, `noise`, `straight_through`,
            `train_weights` and `seed`.

    Attributes:
        moved: For each layer, the fraction of the weights of its start mask that are zero at the end of training.

    Raises:
        ValueError: If a value is out of range, or differs from a checkpoint. When training starts: if the pattern does
            not fit the masks, or `dense` is not the model before pruning.
        MisconfigurationException: When training starts: if Trainer and module do not allow learning masks.
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
        self.moved: dict[str, float] = {}
        self._dense_values: dict[str, Tensor] = {}
        self._known: weakref.ref[nn.Module] | None = None  # the model that had these values
        self._masks: LearnedMasks | None = None
        self._first_step = 0
        self._loaded: Mapping[str, Any] | None = None
        self._is_applied = self._has_learned = self._had_gradients = False
        self._results: list[tuple[Metric, float]] = []

    @property
    def learns(self) -> bool:
        """Whether masks are being learned, also in a run that is about to be resumed."""
        return self._masks is not None or bool(self._loaded and self._loaded["layers"])

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a Trainer, module or pattern with which masks cannot be learned, and read the dense model."""
        if stage != "fit":
            return
        refuse_in_setup(trainer, pl_module, type(self).__name__, self.pattern)
        for callback, _ in holders(trainer):
            pattern = pattern_of(callback, self.pattern, type(self).__name__)
            _refuse_scope(pattern, self.scope)
            if pattern.group_size:
                PatternChoice(pattern.group_kept, pattern.group_size)  # refuses too many choices
        self._masks = self._loaded = None
        self._is_applied = self._has_learned = self._had_gradients = False
        self._results, self.moved = [], {}
        if self._known is None or self._known() is not pruning_target(pl_module):
            self._dense_values = {}
        if self.dense is not None:
            self._remember(dense_model(self.dense, pl_module))
        elif not self._dense_values and not any(isinstance(each, PruningCallback) for each, _ in holders(trainer)):
            raise MisconfigurationException(
                "dense of LearnMasks must be given if no callback prunes during this training, since zeros that are "
                "kept again get their dense values. Give the model before pruning as a module or by its name."
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse a Trainer that leaves no steps to learn masks in."""
        refuse_at_start(trainer, type(self).__name__)

    def before_pruning(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember the weights; `PruningCallback` calls it."""
        if self._masks is not None:
            raise MisconfigurationException(
                "LearnMasks learns masks from the end of pruning on, but a callback prunes again at optimizer step "
                f"{trainer.global_step}. Prune in one training, and learn masks in the next."
            )
        self._remember(pruning_target(pl_module))
        self._known = weakref.ref(pruning_target(pl_module))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start if pruning has ended, and write the masks of this step into the model."""
        if self._masks is None and pruning_has_ended(trainer):
            self._start(trainer)
        if self._masks is not None:
            self._masks.apply(trainer.global_step, self._progress(trainer))
            self._is_applied = True

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Update the scores by the gradients, and prepare the weights for the optimizer."""
        if self._masks is None:
            return
        self._refuse_no_gradients(self._masks, pl_module)
        self._masks.learn(trainer.global_step, self._progress(trainer), self._steps(trainer))
        if not self.choices.train_weights:
            for parameter in pl_module.parameters():
                parameter.grad = None
        self._has_learned = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the exact masks into the model."""
        self._settle()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the exact masks into the model, since a callback before this one may save after an optimizer step."""
        self._settle()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the result, to report what the masks gained."""
        if self._masks is not None and (result := result_of(trainer)):
            self._results.append(result)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Report how far the masks have moved."""
        if self._masks is None:
            return
        self._settle()
        self.moved = self._masks.moved()
        summary = self._summary(trainer.global_step - self._first_step)
        if shows_progress(trainer):
            rank_zero_info(summary)
        layers = {each.layer.name: each.layer for each in self._masks.layers}
        for callback, _ in holders(trainer):
            if isinstance(callback, PruningCallback) and callback.report is not None:
                pruned = [each for each in callback.report.layers if each.name in layers]
                changed = [_with_moved(each, layers[each.name], self.moved[each.name]) for each in pruned]
                callback.masks_have_moved(trainer, summary, changed)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Free everything but the values of the weights, with which the same model can be trained again."""
        if stage == "fit" and self._masks is not None:
            self._dense_values = {each.layer.name: each.values for each in self._masks.layers}
            self._known, self._masks = weakref.ref(pruning_target(pl_module)), None

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Write the exact masks into the model."""
        self._settle()

    def state_dict(self) -> dict[str, Any]:
        """Return the choices and the state of each layer, as plain data and tensors."""
        if self._masks is None and self._loaded is not None:
            return dict(self._loaded)  # a resumed run that has not begun
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
        choices = asdict(self.choices)
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in choices.items()}
        return {"choices": plain, "pattern": repr(self.pattern), "scope": self.scope}

    @torch.no_grad()
    def _remember(self, model: nn.Module) -> None:
        """Store the weights of all prunable layers, except that zeros do not replace earlier values."""
        for layer in prunable_layers(model):
            weight, known = layer.read(), self._dense_values.get(layer.name)
            if known is None or known.shape != weight.shape:
                self._dense_values[layer.name] = weight.clone()
            else:
                self._dense_values[layer.name] = torch.where(weight != 0, weight, known)

    def _progress(self, trainer: L.Trainer) -> float:
        """Return which fraction of the steps is done, from 0 at the first to 1 at the last one."""
        return min(1.0, (trainer.global_step - self._first_step) / max(1.0, self._steps(trainer) - 1))

    def _steps(self, trainer: L.Trainer) -> float:
        """Return the number of steps in which masks are learned."""
        return last_step(trainer) - self._first_step

    def _settle(self) -> None:
        """Write the exact masks into the model; after an optimizer step, those of the new scores."""
        if self._masks is not None and self._has_learned:
            self._masks.settle()
        elif self._masks is not None and self._is_applied:
            self._masks.restore()
        self._is_applied = self._has_learned = False

    def _refuse_no_gradients(self, masks: LearnedMasks, pl_module: L.LightningModule) -> None:
        """Raise an error if the loss depends on other parameters, but never on the layers."""
        if self._had_gradients or all(parameter.grad is None for parameter in pl_module.parameters()):
            return  # a training step may return None to skip a batch
        self._had_gradients = any((g := layer.gradient()) is not None and bool(g.any()) for layer in masks.layers)
        if not self._had_gradients:
            raise MisconfigurationException(
                "LearnMasks needs a loss that depends on the pruned layers, but the gradients of all of them, "
                f"{masks.layers[0].layer.name} first, are zero or missing. Check training_step."
            )

    def _start(self, trainer: L.Trainer) -> None:
        """Take the layers over from the callbacks that hold their zeros."""
        refuse_held(trainer, type(self).__name__)
        saved: Mapping[str, Mapping[str, Tensor]] = self._loaded["layers"] if self._loaded else {}
        self._first_step = self._loaded["first_step"] if self._loaded and saved else trainer.global_step
        groups: list[tuple[Relaxation, list[LearnedLayer]]] = []
        for callback, zeros in holders(trainer):
            layers = [self._layer(layer, keep, saved) for layer, keep in zeros.masks()]
            groups += _groups(layers, pattern_of(callback, self.pattern, type(self).__name__), self.scope)
        for _, zeros in holders(trainer):
            zeros.release()
        self._masks, self._dense_values, self._loaded = LearnedMasks(self.choices, groups), {}, None

    def _layer(self, layer: Layer, keep: Tensor, saved: Mapping[str, Mapping[str, Tensor]]) -> LearnedLayer:
        if layer.name in saved:
            return LearnedLayer.resume(layer, saved[layer.name])
        dense = self._dense_values.get(layer.name)
        if dense is None or dense.shape != keep.shape:
            found = "has no such layer" if dense is None else f"has one of shape {tuple(dense.shape)}"
            raise ValueError(
                f"dense of LearnMasks must be the model before pruning, but instead of {layer.name} of shape "
                f"{tuple(keep.shape)} it {found}. Give the model from which this one was pruned."
            )
        dense = dense.to(layer.weight)
        _refuse_other_order(layer, keep, dense)
        return LearnedLayer.begin(layer, keep, dense, self.choices.prior)

    def _summary(self, steps: int) -> str:
        moved = self.moved.values()
        text = (
            f"LearnMasks moved {fmean(moved):.2%} of the kept weights of a layer in {steps:,} steps "
            f"({min(moved):.2%} to {max(moved):.2%})."
        )
        if len(self._results) < 2:
            return text
        (metric, before), (_, after) = self._results[0], self._results[-1]
        return f"{text} {metric.title} in validation: {metric.text(before)} at first, {metric.text(after)} at the end."


def _with_moved(pruned: PrunedLayer, layer: Layer, moved: float) -> PrunedLayer:
    """Return what the report says of a layer, with its zeros now and how many have moved."""
    note = "; ".join(filter(None, (pruned.note, f"{moved:.2%} of the kept weights moved")))
    return replace(pruned, sparsity=float((layer.weight == 0).float().mean()), note=note, error=None)


def _refuse_other_order(layer: Layer, keep: Tensor, dense: Tensor) -> None:
    """Raise an error if the kept weights have little to do with the dense ones in the same places."""
    kept, before = layer.read()[keep].double(), dense[keep].double()
    alike = float((kept * before).sum() / (kept.norm() * before.norm()).clamp(min=torch.finfo(torch.double).tiny))
    if alike < _ALIKE:
        raise ValueError(
            "dense of LearnMasks must have the weights of the model before pruning in the same order, but the kept "
            f"weights of {layer.name} have a cosine similarity of {alike:.2f} with its dense ones. The presets best "
            "and thorough permute hidden units for N:M: prune during the same training, or with permutation='none'."
        )


def _groups(layers: list[LearnedLayer], pattern: Pattern, scope: str) -> list[tuple[Relaxation, list[LearnedLayer]]]:
    """Return the layers that share a number of zeros, with the relaxation that keeps the number and the pattern."""
    if size := pattern.group_size:
        return [(_choice_of(layer, size), [layer]) for layer in layers]
    parts = [[layer] for layer in layers] if scope == "layer" or not layers else [layers]
    return [(Gates(sum(int(each.first_keep().sum()) for each in part)), part) for part in parts]


def _refuse_scope(pattern: Pattern, scope: str) -> None:
    if pattern.group_size and scope == "model":
        raise ValueError(
            f"scope='model' moves zeros between layers, which pattern={pattern} does not allow. Use scope='layer'."
        )


def _choice_of(layer: LearnedLayer, size: int) -> PatternChoice:
    """Return the choice of patterns for a layer, whose N may differ from that of other layers.

    Groups may keep fewer than N weights, since a kept weight may be zero by chance.
    """
    keep = layer.first_keep()
    kept = keep.reshape(-1, size).sum(dim=1) if keep.numel() % size == 0 else keep.new_zeros(1)
    n = int(kept.max())
    if not 0 < n < size or (kept == n).float().mean() < _EXACT:
        raise ValueError(
            f"pattern of LearnMasks must be that of the zeros, but {layer.layer.name} does not keep the same number in "
            f"every group of {size}. Give the pattern with which the model was pruned, or pattern='unstructured'."
        )
    return PatternChoice(n, size)
