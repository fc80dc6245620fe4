"""Questions of callbacks to a Trainer: its processes, mode and metrics, and the averages of other callbacks."""

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
)
from torch.nn import Module

from wanda_lightning.common.errors import UserError
from wanda_lightning.parallel import SINGLE_PROCESS, Processes
from wanda_lightning.report import PruningReport


def require_lightning(trainer: object) -> None:
    """Refuse a Trainer of `pytorch_lightning`, whose classes have the same names, but are others."""
    if type(trainer).__module__.startswith("pytorch_lightning."):
        raise UserError(
            "The callbacks of wanda_lightning need a Trainer of lightning, but this one is of pytorch_lightning. Write "
            "`import lightning.pytorch as pl` instead of `import pytorch_lightning as pl`, also where modules and "
            "data modules are defined."
        )


def processes_of(trainer: Trainer) -> Processes:
    """Return the processes of a Trainer, in `setup` or later; refuse a strategy whose zeros cannot be kept."""
    require_lightning(trainer)
    strategy = trainer.strategy
    name = type(strategy).__name__

    if isinstance(strategy, ModelParallelStrategy):
        mesh = strategy.device_mesh
        tensor_parallel_size = mesh["tensor_parallel"].size()
        if mesh.size() == 1:
            return SINGLE_PROCESS
        if tensor_parallel_size == 1:
            return Processes(mesh["data_parallel"].get_group(), strategy.root_device)
        name += f" with tensor_parallel_size={tensor_parallel_size}"

    # DeepSpeed, whose class is a DDPStrategy, and FSDP1 flatten weights, even in one process.
    elif not isinstance(strategy, DeepSpeedStrategy | FSDPStrategy):
        if trainer.world_size == 1:
            return SINGLE_PROCESS
        if isinstance(strategy, DDPStrategy):
            return Processes(torch.distributed.group.WORLD, strategy.root_device)

    raise MisconfigurationException(
        f"strategy must leave each process the whole model, or shard it with fully_shard, but it is {name}. Use "
        "strategy='ddp', or prune with devices=1, and train the saved model with ModelParallelStrategy and KeepZeros."
    )


def is_dry_run(trainer: Trainer) -> bool:
    """Whether the Trainer only tries everything out, with `fast_dev_run`, and should write nothing."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def shows_progress(trainer: Trainer) -> bool:
    """Whether the Trainer shows a progress bar."""
    bar = trainer.progress_bar_callback
    return bar is not None and bool(getattr(bar, "is_enabled", True))


def set_metrics(report: PruningReport, trainer: Trainer) -> None:
    """Add the sparsities of a report to the metrics that callbacks such as `ModelCheckpoint` monitor."""
    device = trainer.strategy.root_device
    for name, sparsity in report.metrics().items():
        trainer.callback_metrics[name] = torch.tensor(sparsity, device=device)


def averaged_models(trainer: Trainer) -> list[Module]:
    """Return the models whose weights callbacks average (WeightAveraging and StochasticWeightAveraging)."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    # Both keep the average in this attribute, and neither has a public way to it.
    averages = [getattr(callback, "_average_model", None) for callback in callbacks]
    return [average for average in averages if isinstance(average, Module)]
