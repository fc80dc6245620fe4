"""Functions that read from a Trainer and its LightningModule: model, processes, progress bar, last step."""

from __future__ import annotations

import math

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn

from wanda_lightning.parallel import SINGLE_PROCESS, Processes


def pruning_target(pl_module: L.LightningModule) -> nn.Module:
    """Return the model to prune: the module's `pruning_target` if it has one, else the module itself."""
    target: nn.Module = getattr(pl_module, "pruning_target", pl_module)
    return target


def processes_of(trainer: L.Trainer) -> Processes:
    """Return the processes of a Trainer, in `setup` or later; refuse a strategy whose model cannot be pruned."""
    strategy = trainer.strategy
    if isinstance(strategy, ModelParallelStrategy):
        mesh = strategy.device_mesh
        if (tensor_parallel := mesh["tensor_parallel"].size()) > 1:
            raise MisconfigurationException(
                f"strategy must not split single matrices, but ModelParallelStrategy has "
                f"tensor_parallel_size={tensor_parallel}. Use tensor_parallel_size=1, and data_parallel_size=... with "
                "fully_shard."
            )
        return Processes(mesh["data_parallel"].get_group(), strategy.root_device) if mesh.size() > 1 else SINGLE_PROCESS
    unsupported = isinstance(strategy, DeepSpeedStrategy | FSDPStrategy)  # flatten weights even in one process
    if trainer.world_size == 1 and not unsupported:
        return SINGLE_PROCESS
    if isinstance(strategy, DDPStrategy) and not unsupported:
        return Processes(torch.distributed.group.WORLD, strategy.root_device)
    raise MisconfigurationException(
        f"strategy must leave each process the whole model or whole rows of its matrices, but it is "
        f"{type(strategy).__name__}. Use strategy='ddp', or ModelParallelStrategy with fully_shard (FSDP2) if the "
        "model does not fit on one device. Or prune with Trainer(devices=1), save, and train the pruned model with "
        "KeepZeros."
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
