"""Measure a model with the Trainer, as the commands do before and after they change it."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.callbacks import Callback


def measure(
    module: L.LightningModule, data: L.LightningDataModule, metric: str, callback: Callback | None = None
) -> float:
    """One number of one validation loop, which the callback may prune for first."""
    return measure_all(module, data, callback)[metric]


def measure_all(
    module: L.LightningModule, data: L.LightningDataModule, callback: Callback | None = None
) -> dict[str, float]:
    """All numbers of it."""
    trainer = L.Trainer(
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[callback] if callback else [],
    )
    (metrics,) = trainer.validate(module, data, verbose=False)
    return {name: float(value) for name, value in metrics.items()}
