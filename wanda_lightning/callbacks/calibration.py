"""Where a callback finds its calibration batches, and how one goes through the module."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from wanda_lightning.pruner import forward_batch

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
    loader, source = dataloader, "the dataloader given"
    if loader is None:
        loader, source = _find_loader(trainer, pl_module)
    log.info("calibrating on %s", source)
    if isinstance(loader, Mapping | list | tuple) and len(loader) == 1:
        (loader,) = loader.values() if isinstance(loader, Mapping) else loader
    if isinstance(loader, Mapping) or (isinstance(loader, list | tuple) and dataloader is None):
        raise MisconfigurationException(
            f"{source} is {len(loader)} dataloaders: say which one to calibrate on, by the callback's dataloader= "
            "or by a calibration_dataloader() method"
        )
    seen = 0
    for batch in loader:
        size = _batch_size(batch)
        yield batch if seen + size <= num_samples else _first(batch, size, num_samples - seen)
        seen = min(seen + size, num_samples)
        if seen == num_samples:
            return
    rank_zero_warn(f"num_samples={num_samples} were asked for, but {source} has only {seen}: using these")


def _find_loader(trainer: L.Trainer, pl_module: L.LightningModule) -> tuple[Any, str]:
    datamodule: Any = getattr(trainer, "datamodule", None)
    for holder in (datamodule, pl_module):
        if callable(calibration_dataloader := getattr(holder, "calibration_dataloader", None)):
            return calibration_dataloader(), f"{type(holder).__name__}.calibration_dataloader()"
    if trainer.train_dataloader is not None:
        return trainer.train_dataloader, "the train dataloader"
    if datamodule is not None and is_overridden("train_dataloader", datamodule):
        datamodule.setup("fit")  # Lightning has set it up for evaluation only
        return datamodule.train_dataloader(), f"{type(datamodule).__name__}.train_dataloader()"
    if is_overridden("train_dataloader", pl_module):
        return pl_module.train_dataloader(), f"{type(pl_module).__name__}.train_dataloader()"
    for name in ("val_dataloaders", "test_dataloaders", "predict_dataloaders"):
        if (loader := getattr(trainer, name)) is not None:
            return loader, f"the {name.removesuffix('_dataloaders')} dataloader"
    raise MisconfigurationException(
        "there is no data to calibrate on: give the callback a dataloader=, or define calibration_dataloader() in the "
        "LightningDataModule or LightningModule"
    )


def calibration_forward(trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> object:
    """Put a batch through the module as Lightning's loops would: precision, transfer hooks, device."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.strategy.batch_to_device(pl_module.on_before_batch_transfer(batch, 0))
    calibration_step = getattr(pl_module, "calibration_step", None)
    return calibration_step(batch) if callable(calibration_step) else forward_batch(pl_module, batch)


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
        return [_first(value, size, count) for value in batch]
    return batch
