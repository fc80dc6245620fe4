"""Send the figures of a report to the loggers of a Trainer."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger

from wanda_lightning.report import PruningReport
from wanda_lightning.report.page import images_of


def log_figures(report: PruningReport, trainer: L.Trainer) -> None:
    """Log each figure as an image, from the first process, to the loggers that take images.

    These are the loggers with `log_image(key, images, step)`, such as `WandbLogger`, and `TensorBoardLogger`.
    """
    if not trainer.is_global_zero:
        return
    loggers: list[Any] = [each for each in trainer.loggers if _takes_images(each)]
    for name, image in images_of(report).items() if loggers else ():
        for logger in loggers:
            key = f"pruning/{name}"
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(key, image, trainer.global_step, dataformats="HWC")
            else:
                logger.log_image(key, [image], step=trainer.global_step)


def _takes_images(logger: object) -> bool:
    return isinstance(logger, TensorBoardLogger) or callable(getattr(logger, "log_image", None))
