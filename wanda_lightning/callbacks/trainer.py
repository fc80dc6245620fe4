"""Read the model, its processes and its progress bar from a Trainer, and publish the report of a pruning."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from wanda_lightning.parallel import SINGLE_PROCESS, Processes
from wanda_lightning.report import PruningReport, Run


def pruning_target(pl_module: L.LightningModule) -> nn.Module:
    """Return the model to prune: the module's `pruning_target` if it has one, else the module itself."""
    target: nn.Module = getattr(pl_module, "pruning_target", pl_module)
    return target


def processes_of(trainer: L.Trainer) -> Processes:
    """Return the processes of a Trainer, in `setup` or later; refuse a strategy whose zeros cannot be kept."""
    strategy, name = trainer.strategy, type(trainer.strategy).__name__
    if isinstance(strategy, ModelParallelStrategy):
        mesh = strategy.device_mesh
        if (size := mesh["tensor_parallel"].size()) == 1:
            group = mesh["data_parallel"].get_group()
            return Processes(group, strategy.root_device) if mesh.size() > 1 else SINGLE_PROCESS
        name += f" with tensor_parallel_size={size}"
    elif not isinstance(strategy, DeepSpeedStrategy | FSDPStrategy):  # which flatten weights, even in one process
        if trainer.world_size == 1:
            return SINGLE_PROCESS
        if isinstance(strategy, DDPStrategy):
            return Processes(torch.distributed.group.WORLD, strategy.root_device)
    raise MisconfigurationException(
        f"strategy must leave each process the whole model or whole rows of its matrices, but it is {name}. Use "
        "strategy='ddp'; or prune with Trainer(devices=1), save, and train the pruned model with KeepZeros and "
        "ModelParallelStrategy with fully_shard (FSDP2)."
    )


def averaged_models(trainer: L.Trainer) -> list[nn.Module]:
    """Return the models whose weights callbacks average (WeightAveraging and StochasticWeightAveraging)."""
    found = (getattr(callback, "_average_model", None) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    return [average for average in found if isinstance(average, nn.Module)]


def shows_progress(trainer: L.Trainer) -> bool:
    """Whether the Trainer shows a progress bar."""
    bar = trainer.progress_bar_callback
    return bar is not None and bool(getattr(bar, "is_enabled", True))


def last_step(trainer: L.Trainer) -> float:
    """Return the number of optimizer steps after which training ends, or infinity if it is not known."""
    known: list[float] = [trainer.max_steps]
    if trainer.lightning_module.automatic_optimization:
        known.append(trainer.estimated_stepping_batches)
    return min((steps for steps in known if steps != -1), default=math.inf)


def run_of(trainer: L.Trainer, calibration_samples: int) -> Run:
    """Describe the run; with 0 samples, it was not calibrated on the datamodule."""
    describe: Any = getattr(getattr(trainer, "datamodule", None), "describe_calibration", None)
    calibration = describe(calibration_samples) if describe and calibration_samples else ""
    return Run(model=_name_of(trainer.lightning_module), calibration=calibration)


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
    trainer.callback_metrics.update({name: torch.tensor(x, device=device) for name, x in report.metrics().items()})


def _name_of(pl_module: L.LightningModule) -> str:
    """Return the name from which the model was loaded; empty if it is not known."""
    choices, model = pl_module.hparams, pruning_target(pl_module)
    name = choices.get("model")
    if not hasattr(model, "pretrained_cfg"):
        own = str(getattr(model, "name_or_path", ""))  # other models have none, so `name` could mean anything
        return name if isinstance(name, str) and hasattr(model, "name_or_path") else own
    if not isinstance(name, str):
        return ""
    source = choices.get("checkpoint") or ("" if choices.get("pretrained", True) else "not pretrained")
    return f"timm:{name.removeprefix('timm:')}" + (f" ({source})" if source else "")
