"""The base class of our LightningDataModules."""

from __future__ import annotations

import warnings

import lightning as L
from lightning.fabric.utilities.warnings import PossibleUserWarning

from wanda_lightning.common.checks import refuse_pytorch_lightning


class DataModule(L.LightningDataModule):
    """Refuses a Trainer of `pytorch_lightning`, whose own error would only be "Expected a parent"."""

    @property
    def trainer(self) -> L.Trainer | None:
        """The Trainer that uses the data."""
        return self._trainer

    @trainer.setter
    def trainer(self, trainer: L.Trainer | None) -> None:
        refuse_pytorch_lightning(trainer)
        self._trainer = trainer


def silence_worker_advice() -> None:
    """Stop Lightning from recommending workers, with which a loader over data in memory is slower; it has no option."""
    warnings.filterwarnings("ignore", message=r"The '\w+' does not have many workers", category=PossibleUserWarning)
