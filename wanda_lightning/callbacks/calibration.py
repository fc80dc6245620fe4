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
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler

from wanda_lightning.pruner import forward_batch, like

log = logging.getLogger(__name__)


def pruning_target(pl_module: L.LightningModule) -> nn.Module:
    """The model to prune: what the module calls its `pruning_target`, else the module itself."""
    target = getattr(pl_module, "pruning_target", pl_module)
    assert isinstance(target, nn.Module)
    return target


def calibration_batches(
    trainer: L.Trainer, pl_module: L.LightningModule, dataloader: Iterable[Any] | None, num_samples: int
) -> Iterator[Any]:
    """The first `num_samples` samples of the calibration data, in the batches that its loader makes.

    Warns where there are fewer.

    Raises:
        MisconfigurationException: If there is no data, or more than one loader to choose from.
    """
    loader, source = (dataloader, "the dataloader given") if dataloader is not None else _find(trainer, pl_module)
    log.info("calibrating on %s", source)
    seen = 0
    for batch in loader:
        size = _batch_size(batch)
        yield batch if seen + size <= num_samples else _first(batch, size, num_samples - seen)
        seen = min(seen + size, num_samples)
        if seen == num_samples:
            return
    rank_zero_warn(f"num_samples={num_samples} were asked for, but {source} has only {seen}: using these")


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
        return loader
    # Copies of samplers, not of the data that they refer to.
    copied = partial(copy.deepcopy, memo={id(loader.dataset): loader.dataset})
    order: dict[str, Any]
    if loader.batch_sampler is not None and type(loader.batch_sampler) is not BatchSampler:
        order = {"batch_sampler": copied(loader.batch_sampler)}
    elif isinstance(loader.dataset, IterableDataset):
        order = {"batch_size": loader.batch_size}
    elif isinstance(loader.sampler, RandomSampler):
        generator = torch.Generator().manual_seed(torch.initial_seed())
        order = {"batch_size": loader.batch_size, "shuffle": True, "generator": generator}
    else:
        order = {"batch_size": loader.batch_size, "sampler": copied(loader.sampler)}
    return DataLoader(
        loader.dataset,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        worker_init_fn=loader.worker_init_fn,
        **order,
    )


def calibration_forward(trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> object:
    """Put a batch through the module as Lightning's loops would: precision, transfer hooks, device."""
    batch = pl_module._on_before_batch_transfer(trainer.precision_plugin.convert_input(batch))
    batch = trainer.strategy.batch_to_device(batch)
    if callable(calibration_step := getattr(pl_module, "calibration_step", None)):
        return calibration_step(batch)
    if not is_overridden("forward", pl_module):
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


def _batch_size(batch: Any) -> int:
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
        return like(batch, [_first(value, size, count) for value in batch])
    return batch
