"""Where a callback finds its calibration batches, and how one goes through the module."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler
from torch.utils.data.distributed import DistributedSampler

from wanda_lightning.calibration.batches import forward_batch, rebuild
from wanda_lightning.parallel import SINGLE_PROCESS, Processes

log = logging.getLogger(__name__)


def pruning_target(pl_module: L.LightningModule) -> nn.Module:
    """The model to prune: what the module calls its `pruning_target`, else the module itself."""
    target = getattr(pl_module, "pruning_target", pl_module)
    assert isinstance(target, nn.Module)
    return target


def processes_of(trainer: L.Trainer) -> Processes:
    """The processes of a Trainer, to prune together; from `setup` on.

    Raises:
        MisconfigurationException: If its strategy spreads the model in a way that cannot be pruned.
    """
    strategy = trainer.strategy
    if isinstance(strategy, ModelParallelStrategy):
        mesh = strategy.device_mesh
        if (tensor_parallel := mesh["tensor_parallel"].size()) > 1:
            raise MisconfigurationException(
                f"ModelParallelStrategy runs with tensor_parallel_size={tensor_parallel}, and what tensor parallelism "
                "spreads cannot be pruned: use tensor_parallel_size=1 and data_parallel_size=... with fully_shard"
            )
        return Processes(mesh["data_parallel"].get_group(), strategy.root_device) if mesh.size() > 1 else SINGLE_PROCESS
    unsupported = isinstance(strategy, DeepSpeedStrategy | FSDPStrategy)  # also one process alone flattens weights
    if trainer.world_size == 1 and not unsupported:
        return SINGLE_PROCESS
    if isinstance(strategy, DDPStrategy) and not unsupported:
        return Processes(torch.distributed.group.WORLD, strategy.root_device)
    raise MisconfigurationException(
        f"{type(strategy).__name__} spreads the model over processes in a way that cannot be pruned: use "
        "strategy='ddp', or, where the model is too large for one device, ModelParallelStrategy with fully_shard "
        "(FSDP2). Or prune with Trainer(devices=1), save, and train the pruned model with KeepZeros."
    )


def calibration_batches(
    trainer: L.Trainer,
    pl_module: L.LightningModule,
    dataloader: Iterable[Any] | None,
    num_samples: int,
    processes: Processes = SINGLE_PROCESS,
) -> Iterator[Any]:
    """The first `num_samples` samples of the calibration data, in the batches that its loader makes.

    Of several processes, each gets its share: by turns a batch of a loader that is the same for all; or the first
    samples of a loader that has a share of its own (`DistributedSampler`, which Lightning gives its loaders).

    Warns where there are fewer samples. With several processes, takes over the random state of the first one.

    Raises:
        MisconfigurationException: If there is no data, or more than one loader to choose from.
    """
    if processes.world_size > 1:  # who shuffles shuffles alike
        torch.set_rng_state(processes.broadcast(torch.get_rng_state(), 0))
    loader, source = (dataloader, "the dataloader given") if dataloader is not None else _find(trainer, pl_module)
    log.info("calibration_mode on %s", source)
    every, turn, wanted = processes.world_size, processes.rank, num_samples
    if every > 1 and _is_a_share(loader):
        wanted = num_samples // every + (turn < num_samples % every)
        every, turn, source = 1, 0, f"this process's share of {source}"
    seen = 0
    for index, batch in enumerate(loader if wanted else ()):
        size = batch_size(batch)
        if index % every == turn:
            yield batch if seen + size <= wanted else _first(batch, size, wanted - seen)
        seen = min(seen + size, wanted)
        if seen == wanted:
            return
    if seen < wanted:
        rank_zero_warn(f"num_samples={wanted} were asked for, but {source} has only {seen}: using these")


def _is_a_share(loader: Any) -> bool:
    """Whether a loader gives each process other samples."""
    samplers = getattr(loader, "sampler", None), getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    return any(isinstance(sampler, DistributedSampler) for sampler in samplers)


def _find(trainer: L.Trainer, pl_module: L.LightningModule) -> tuple[Any, str]:
    datamodule: Any = getattr(trainer, "datamodule", None)
    for holder in (datamodule, pl_module):
        if callable(calibration_dataloader := getattr(holder, "calibration_dataloader", None)):
            return calibration_dataloader(), f"{type(holder).__name__}.calibration_dataloader()"
    if trainer.train_dataloader is not None:
        return _private(_only(trainer.train_dataloader, "train")), "the train dataloader"
    if datamodule is not None and is_overridden("train_dataloader", datamodule):
        datamodule.setup("fit")  # Lightning has set it up for evaluation only
        return _only(datamodule.train_dataloader(), "train"), f"{type(datamodule).__name__}.train_dataloader()"
    if is_overridden("train_dataloader", pl_module):
        try:
            loaders = pl_module.train_dataloader()
        except Exception as error:  # Lightning has called setup() for evaluation only
            raise MisconfigurationException(
                f"{type(pl_module).__name__}.train_dataloader() gives nothing to calibrate on outside fit: give the "
                f"callback a dataloader=, or define calibration_dataloader(). The cause: {error!r}"
            ) from error
        return _only(loaders, "train"), f"{type(pl_module).__name__}.train_dataloader()"
    for kind in ("val", "test", "predict"):
        if (loader := getattr(trainer, f"{kind}_dataloaders")) is not None:
            return _private(_only(loader, kind)), f"the {kind} dataloader"
    raise MisconfigurationException(
        "there is no data to calibrate on: give the callback a dataloader=, or define calibration_dataloader() in the "
        "LightningDataModule or LightningModule"
    )


def _only(loaders: Any, kind: str) -> Any:
    """The one loader there is."""
    if not isinstance(loaders, Mapping | list | tuple):
        return loaders
    if len(loaders) != 1:
        raise MisconfigurationException(
            f"there are {len(loaders)} {kind} dataloaders: say which one to calibrate on, by the callback's "
            "dataloader= or by a calibration_dataloader() method"
        )
    (loader,) = loaders.values() if isinstance(loaders, Mapping) else loaders
    return loader


def _private(loader: Any) -> Any:
    """The same data, without touching what Lightning's loop is about to iterate: its workers, samplers, generators."""
    if type(loader) is not DataLoader:
        return copy.copy(loader)
    # Copies of samplers, not of the data that they refer to.
    clone_arguments = partial(copy.deepcopy, memo={id(loader.dataset): loader.dataset})
    order: dict[str, Any]
    if loader.batch_sampler is not None and type(loader.batch_sampler) is not BatchSampler:
        order = {"batch_sampler": clone_arguments(loader.batch_sampler)}
    elif isinstance(loader.dataset, IterableDataset):
        order = {"batch_size": loader.batch_size}
    elif isinstance(loader.sampler, RandomSampler):
        generator = torch.Generator().manual_seed(torch.initial_seed())
        order = {"batch_size": loader.batch_size, "shuffle": True, "generator": generator}
    else:
        order = {"batch_size": loader.batch_size, "sampler": clone_arguments(loader.sampler)}
    return DataLoader(
        loader.dataset,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        worker_init_fn=loader.worker_init_fn,
        **order,
    )


def calibration_forward(
    trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, for_predictions: bool = False
) -> object:
    """Put a batch through the module as Lightning's loops would: precision, transfer hooks, device.

    For predictions by its `calibration_predictions(batch)` or its forward; else by its `calibration_step(batch)`, which
    may leave out what comes after the last layer, or its forward.
    """
    batch = pl_module._on_before_batch_transfer(trainer.precision_plugin.convert_input(batch))
    batch = trainer.strategy.batch_to_device(batch)
    if for_predictions and callable(predictions := getattr(pl_module, "calibration_predictions", None)):
        return predictions(batch)
    has_forward = is_overridden("forward", pl_module)
    calibration_step = getattr(pl_module, "calibration_step", None)
    if callable(calibration_step) and not (for_predictions and has_forward):
        return calibration_step(batch)
    if not has_forward:
        raise MisconfigurationException(
            f"{type(pl_module).__name__} has no forward to run a calibration batch through: "
            "define forward(), or calibration_step(batch)"
        )
    return forward_batch(pl_module, batch)


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping | list | tuple):
        for value in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(value)


def batch_size(batch: Any) -> int:
    """Number of samples: the length of the first tensor."""
    tensor = next((tensor for tensor in _tensors(batch) if tensor.ndim), None)
    if tensor is None:
        raise MisconfigurationException(f"a calibration batch of type {type(batch).__name__} holds no tensor")
    return len(tensor)


def _first(batch: Any, size: int, count: int) -> Any:
    """The first samples of a batch of `size`."""
    if isinstance(batch, Tensor):
        return batch[:count] if batch.ndim and len(batch) == size else batch
    if isinstance(batch, Mapping):
        return {key: _first(value, size, count) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return rebuild(batch, [_first(value, size, count) for value in batch])
    return batch
