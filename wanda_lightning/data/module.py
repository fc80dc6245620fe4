"""The base class of our LightningDataModules."""

from __future__ import annotations

import lightning as L

from wanda_lightning.checks import refuse_pytorch_lightning


class DataModule(L.LightningDataModule):
    """Refuses a Trainer of `pytorch_lightning`, which would say no more than "Expected a parent"."""

    @property
    def trainer(self) -> L.Trainer | None:
        """The Trainer that uses the data."""
        return self._trainer

    @trainer.setter
    def trainer(self, trainer: L.Trainer | None) -> None:
        refuse_pytorch_lightning(trainer)
        self._trainer = trainer
