"""Prune the model of a Trainer, and show, log and save the report."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng

from wanda_lightning.callbacks.batches import calibration_batches, calibration_forward
from wanda_lightning.callbacks.trainer import processes_of, pruning_target, shows_progress
from wanda_lightning.config import PruningConfig
from wanda_lightning.pruning import prune_as
from wanda_lightning.report import PruningReport


def prune_module(
    config: PruningConfig,
    trainer: L.Trainer,
    pl_module: L.LightningModule,
    dataloader: Iterable[Any] | None,
    num_samples: int,
) -> PruningReport:
    """Prune a LightningModule inside its Trainer, without changing the random numbers that training draws.

    Args:
        config: The choices.
        trainer: The Trainer, whose precision, strategy and dataloaders are used.
        pl_module: The module.
        dataloader: The calibration data; if None, `calibration_batches` finds them.
        num_samples: Number of calibration samples.
    """
    processes = processes_of(trainer)
    with isolate_rng(), torch.inference_mode(False), trainer.precision_plugin.forward_context():
        return prune_as(
            config,
            pruning_target(pl_module),
            calibration_batches(trainer, pl_module, dataloader, num_samples, processes),
            forward=partial(calibration_forward, trainer, pl_module),
            predict=partial(calibration_forward, trainer, pl_module, for_predictions=True),
            progress=shows_progress(trainer),
            processes=processes,
        )


def publish(report: PruningReport, trainer: L.Trainer, name: str, folder: str | Path | None) -> None:
    """Show a summary that starts with `name`, log the metrics, and save `pruning_report.json` if `folder` is given."""
    if shows_progress(trainer):
        rank_zero_info(f"{name}: {report.summary()}")
    for logger in trainer.loggers:
        logger.log_metrics(report.metrics(), step=trainer.global_step)
    if folder is not None and trainer.is_global_zero:
        report.save(folder)
