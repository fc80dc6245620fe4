"""The base class of all callbacks that prune or keep zeros."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.callbacks import Callback

from wanda_lightning.callbacks.trainer import averaged_models
from wanda_lightning.report import PruningReport
from wanda_lightning.training.held_zeros import HeldZeros


class ZerosCallback(Callback):
    """A callback that prunes or keeps zeros while a model trains.

    Other callbacks of the Trainer and data modules read its properties. Derive your own callback from this class so
    that they read its properties, too.
    """

    def __init__(self) -> None:
        self._zeros = HeldZeros()

    @property
    def holds_zeros(self) -> bool:
        """Whether it keeps weights at zero now."""
        return self._zeros.is_holding

    @property
    def is_finished(self) -> bool:
        """Whether it has pruned the model to its final sparsity, or never prunes."""
        return True

    @property
    def reads_calibration_data(self) -> bool:
        """Whether it may prune with data from `calibration_dataloader()` of the datamodule or module."""
        return False

    @property
    def report(self) -> PruningReport | None:
        """The report of the latest pruning; None before the first."""
        return None

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove the hooks."""
        self._zeros.release()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Remove the hooks."""
        self._zeros.release()

    def _clear_copies(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Zero copies of held zeros: the optimizers' moments, and the weights that averaging callbacks average."""
        self._zeros.clear(trainer.optimizers)
        self._zeros.clear_copies(pl_module, averaged_models(trainer))


def zeros_callbacks(trainer: L.Trainer) -> list[ZerosCallback]:
    """Return the callbacks of a Trainer that prune or keep zeros."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, ZerosCallback)]
