"""Move the zeros of a pruned model every few steps while it trains."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from torch.optim import Optimizer

from wanda_lightning.callbacks.keep_zeros import holders
from wanda_lightning.callbacks.learn_masks import LearnMasks
from wanda_lightning.callbacks.moving_zeros import (
    pattern_of,
    pruning_has_ended,
    refuse_at_start,
    refuse_held,
    refuse_in_setup,
)
from wanda_lightning.callbacks.trainer import last_step
from wanda_lightning.checks import check_at_least
from wanda_lightning.config import resolve_pattern
from wanda_lightning.core.hyperparameters import Number, check
from wanda_lightning.core.patterns import Pattern
from wanda_lightning.core.rigl import drop_and_grow


class RigL(Callback):
    """Drop small weights and grow others by the size of their gradients, every few optimizer steps (Evci et al. 2020).

    It moves the zeros that `PruningCallback` or `KeepZeros` holds, one of which the Trainer must have. At a step that
    moves zeros, the gradients of all weights accumulate. Before the optimizer uses them, each layer drops a share of
    its kept weights, those of smallest magnitude, and keeps as many zeros with the largest gradients instead. These
    start from zero and change in the same step. So each layer has the same number of zeros after every step, and N:M
    stays N:M. The share falls to 0 along a cosine.

    Args:
        every: Number of optimizer steps from one move to the next.
        share: Fraction of the kept weights of each layer that are replaced, in (0, 1], before it falls.
        until: Fraction of the steps of training after which no zeros move, in (0, 1].
        pattern: The pattern of the zeros that `KeepZeros` holds, `"unstructured"` or N:M such as `"2:4"`. The pattern
            of a `PruningCallback` is known.

    Raises:
        ValueError: If a value is out of range.
        MisconfigurationException: When training starts: if Trainer and module do not allow moving zeros, or training
            ends before the first move.
    """

    def __init__(
        self, every: int = 100, share: float = 0.3, until: float = 0.75, pattern: str | Pattern | None = None
    ) -> None:
        check_at_least(1, every=every)
        self.every, self.share, self.until = every, share, until
        check(self, share=Number(above=0, maximum=1), until=Number(above=0, maximum=1))
        self.pattern = None if pattern is None else resolve_pattern(pattern)
        self._is_due = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a Trainer or module with which zeros cannot move."""
        if stage != "fit":
            return
        self._is_due = False
        refuse_in_setup(trainer, pl_module, type(self).__name__, self.pattern)
        if any(isinstance(other, LearnMasks) for other in trainer.callbacks):  # type: ignore[attr-defined]
            raise MisconfigurationException("RigL and LearnMasks both move the zeros of a model. Use one of them.")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse a Trainer that leaves no steps to move zeros at."""
        refuse_at_start(trainer, type(self).__name__)
        if self.every > self.until * last_step(trainer):
            raise MisconfigurationException(
                f"every of RigL must be at most {self.until:g} of the {last_step(trainer):.0f} steps of training, but "
                f"it is {self.every}. Move zeros more often, or train longer."
            )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Let the gradients of zeros accumulate if the next optimizer step moves zeros."""
        step = trainer.global_step + 1
        self._is_due = step % self.every == 0 and step <= self.until * last_step(trainer) and pruning_has_ended(trainer)
        if self._is_due:
            refuse_held(trainer, type(self).__name__)
        for _, zeros in holders(trainer):
            zeros.masks_gradients = not self._is_due

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Move the zeros if this step is due."""
        if not self._is_due:
            return
        progress = (trainer.global_step + 1) / (self.until * last_step(trainer))
        share = self.share * (1 + math.cos(math.pi * progress)) / 2
        for callback, zeros in holders(trainer):
            size = pattern_of(callback, self.pattern, type(self).__name__).group_size
            zeros.move(partial(drop_and_grow, share=share, group_size=size))
            zeros.clear([optimizer])

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Mask gradients again."""
        for _, zeros in holders(trainer):
            zeros.masks_gradients = True

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Mask gradients again."""
        self.on_train_end(trainer, pl_module)
