"""Describe the run in the report of a callback, and show the report on the console, to loggers and callbacks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from wanda_lightning.callbacks.schedules import PruningState
from wanda_lightning.callbacks.trainer import pruning_target, shows_progress
from wanda_lightning.report import Measured, PruningReport, Run
from wanda_lightning.report.descriptions import METRICS
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


def run_of(trainer: L.Trainer, calibration_samples: int) -> Run:
    """Describe a run that has measured nothing. With 0 samples, it was not calibrated on the datamodule."""
    run = Run(model=_name_of(trainer.lightning_module))
    describe: Any = getattr(getattr(trainer, "datamodule", None), "describe_calibration", None)
    return replace(run, calibration=describe(calibration_samples)) if describe and calibration_samples else run


def with_result(run: Run, trainer: L.Trainer, is_dense: bool) -> Run:
    """Return the run with the result of the evaluation loop that has just ended, if it measured a known metric."""
    logged: Mapping[str, Any] = trainer.callback_metrics
    found = [(metric, name) for metric in METRICS.values() for name in metric.logged if name in logged]
    if not found:
        return run
    (metric, name), *_ = found
    value = float(logged[name])
    if metric.is_share and value > 1:  # not a fraction
        return run
    data: Any = getattr(trainer, "datamodule", None)
    describe: Any = getattr(data, "describe_evaluation", None)
    limit = trainer.limit_test_batches if trainer.testing else trainer.limit_val_batches
    is_whole = isinstance(limit, float) and limit == 1  # the integer 1 is one batch
    run = replace(run, metric=metric.name, data=describe() if describe and is_whole else "")
    run = replace(run, before=value) if is_dense else replace(run, after=value)
    others = {each.data: each for each in run.others}
    for number, source in enumerate(getattr(data, "evaluations", ())[1:], start=1):
        if is_whole and (other := logged.get(f"{name}/{source}")) is not None:
            text = describe(number)
            known = others.get(text, Measured(text, None, None))
            others[text] = replace(known, before=float(other)) if is_dense else replace(known, after=float(other))
    return replace(run, others=tuple(others.values()))


def measured_before(run: Run, trainer: L.Trainer, state: PruningState) -> Run:
    """Return the run with the result of the dense model, which the loop before the first stage has measured."""
    if not state.share:  # that loop has just ended
        return with_result(run, trainer, is_dense=True)
    first = None if state.report is None else state.report.run
    if first is None:
        return run
    others = tuple(replace(other, after=None) for other in first.others)
    return replace(run, metric=first.metric, before=first.before, data=first.data, others=others)


def _name_of(pl_module: L.LightningModule) -> str:
    """Return the name from which the model was loaded; empty if it is not known."""
    choices, model = pl_module.hparams, pruning_target(pl_module)
    name = choices.get("model")
    if not hasattr(model, "pretrained_cfg"):
        own = str(getattr(model, "name_or_path", ""))  # other models have none, so `name` could mean anything
        return name if isinstance(name, str) and hasattr(model, "name_or_path") else own
    if not isinstance(name, str):
        return ""
    name = f"timm:{name.removeprefix('timm:')}"
    if checkpoint := choices.get("checkpoint"):
        return f"{name} ({checkpoint})"
    return name if choices.get("pretrained", True) else f"{name} (not pretrained)"
