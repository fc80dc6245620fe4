"""Describe the run in the report of a callback, and show the report on the console, to loggers and callbacks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info

from wanda_lightning.callbacks.trainer import pruning_target, shows_progress
from wanda_lightning.report import Measured, PruningReport, Run
from wanda_lightning.report.descriptions import METRICS


def publish(report: PruningReport, trainer: L.Trainer, name: str) -> None:
    """Print the summary under a name, and give the metrics to loggers and callbacks."""
    if shows_progress(trainer):
        rank_zero_info(f"{name}: {report.summary()}")
    for logger in trainer.loggers:
        logger.log_metrics(report.metrics(), step=trainer.global_step)
    set_metrics(report, trainer)


def set_metrics(report: PruningReport, trainer: L.Trainer) -> None:
    """Add the sparsities of a report to the metrics that callbacks such as `ModelCheckpoint` monitor."""
    device = trainer.strategy.root_device
    trainer.callback_metrics.update(
        {name: torch.tensor(value, device=device) for name, value in report.metrics().items()}
    )


def run_of(trainer: L.Trainer, calibration_samples: int) -> Run:
    """Describe a run that has measured nothing. With 0 samples, it was not calibrated on the datamodule."""
    run = Run(model=_name_of(trainer.lightning_module))
    describe: Any = getattr(getattr(trainer, "datamodule", None), "describe_calibration", None)
    return replace(run, calibration=describe(calibration_samples)) if describe and calibration_samples else run


def with_result(run: Run, trainer: L.Trainer) -> Run:
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
    others = [
        Measured(describe(number), None, float(logged[f"{name}/{source}"]))
        for number, source in enumerate(getattr(data, "evaluations", ())[1:], start=1)
        if is_whole and f"{name}/{source}" in logged
    ]
    text = describe() if describe and is_whole else ""
    return replace(run, metric=metric.name, after=value, data=text, others=tuple(others))


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
