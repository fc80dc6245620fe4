"""Keep the best checkpoint of a pruned model."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from wanda_lightning.callbacks.zeros import zeros_callbacks


class BestAfterPruning(ModelCheckpoint):
    """Lightning's `ModelCheckpoint`, but only checkpoints from after the last stage of pruning are compared.

    A dense model usually scores better than a pruned one, so `ModelCheckpoint(monitor=...)` would keep a checkpoint
    from before pruning. This callback compares none before the last stage of every pruning callback of the Trainer, and
    then waits for the next validation loop, so that no score of an earlier model counts. It takes all arguments of
    `ModelCheckpoint`. `save_last=True` also saves before the last stage, for resuming.

    Args:
        monitor: Name of the metric to compare.
        mode: `"min"` or `"max"`.
        **options: The other arguments of `ModelCheckpoint`.
    """

    def __init__(self, monitor: str, mode: str = "min", **options: Any) -> None:
        super().__init__(monitor=monitor, mode=mode, **options)
        self._compares = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compare from the start if the model is already pruned."""
        super().on_train_start(trainer, pl_module)
        self._compares = _is_pruned(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compare from the first validation loop after pruning."""
        self._compares = _is_pruned(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Without validation loops, compare from the first batch after pruning."""
        if not trainer.enable_validation:
            self._compares = _is_pruned(trainer)

    def check_monitor_top_k(self, trainer: L.Trainer, current: Tensor | None = None) -> bool:
        """Whether the checkpoint is among the best since the last stage of pruning."""
        return self._compares and super().check_monitor_top_k(trainer, current)


def _is_pruned(trainer: L.Trainer) -> bool:
    return all(callback.is_finished for callback in zeros_callbacks(trainer))
