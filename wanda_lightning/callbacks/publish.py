"""Show a report: on the console, to loggers, and to callbacks that monitor metrics."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from wanda_lightning.callbacks.trainer import shows_progress
from wanda_lightning.report import PruningReport
from wanda_lightning.report.figures import plots_of, to_figure


def publish(report: PruningReport, trainer: L.Trainer, name: str, with_figures: bool) -> None:
    """Print the summary under a name, and give the metrics, and if asked the figures, to loggers and callbacks."""
    if shows_progress(trainer):
        rank_zero_info(f"{name}: {report.summary()}")
    for logger in trainer.loggers:
        logger.log_metrics(report.metrics(), step=trainer.global_step)
    set_metrics(report, trainer)
    if with_figures:
        _log_figures(report, trainer)


def set_metrics(report: PruningReport, trainer: L.Trainer) -> None:
    """Add the sparsities of a report to the metrics that callbacks such as `ModelCheckpoint` monitor."""
    device = trainer.strategy.root_device
    trainer.callback_metrics.update(
        {name: torch.tensor(value, device=device) for name, value in report.metrics().items()}
    )


def _log_figures(report: PruningReport, trainer: L.Trainer) -> None:
    """Log each figure as an image, from the first process, to the loggers that take images.

    These are the loggers with `log_image(key, images, step)`, such as `WandbLogger`, and `TensorBoardLogger`.
    """
    if not trainer.is_global_zero:
        return
    loggers: list[Any] = [
        each
        for each in trainer.loggers
        if isinstance(each, TensorBoardLogger) or callable(getattr(each, "log_image", None))
    ]
    for plot in plots_of(report) if loggers else ():
        for logger in loggers:
            key, figure = f"pruning/{plot.name}", to_figure([plot])
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure(key, figure, trainer.global_step)
            else:
                logger.log_image(key, [figure], step=trainer.global_step)
