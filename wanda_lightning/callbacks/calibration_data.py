"""The calibration batches of a callback: find them, and run one through the module."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from types import NoneType
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, Sampler
from torch.utils.data.distributed import DistributedSampler

from wanda_lightning.calibration.batches import batch_size, is_even, run_alone, take
from wanda_lightning.calibration.observer import PassiveCalibration
from wanda_lightning.calibration.pruning_mode import pruning_mode
from wanda_lightning.calibration.samples import forward_batch
from wanda_lightning.parallel import Processes
from wanda_lightning.planning.plan import Plan


@dataclass
class CalibrationData:
    """The first `num_samples` samples of the calibration data, and how a batch of them runs through the module.

    With several processes, each gets a part of the samples: every `world_size`-th batch if the loader yields the same
    batches in each process, or the first samples if the loader has a `DistributedSampler`, as Lightning's loaders have.

    Raises:
        MisconfigurationException: Without data, or with more than one loader.
    """

    trainer: L.Trainer
    module: L.LightningModule
    dataloader: Iterable[Any] | None
    num_samples: int
    processes: Processes

    def batches(self) -> Iterator[Any]:
        """Yield the samples in the batches that the loader makes; warn if there are fewer.

        All processes continue with the random state of the first, so that their loaders shuffle in the same order.
        """
        yield from self._first_samples(*_find(self.trainer, self.module, self.dataloader))

    def trial_batches(self) -> Iterator[Any] | None:
        """Return the same batches from a copy of the loader, with the same errors; None for data that are used up."""
        loader, source = _find(self.trainer, self.module, self.dataloader)
        if isinstance(loader, Iterator) or isinstance(
            getattr(loader, "dataset", None), IterableDataset
        ):
            return None  # the copy would share its state
        return self._first_samples(_independent_copy(loader), source)

    def _first_samples(self, loader: Any, source: str) -> Iterator[Any]:
        processes = self.processes
        wanted = self.num_samples
        if processes.world_size > 1:
            torch.set_rng_state(processes.broadcast(torch.get_rng_state(), 0))
        step = processes.world_size
        offset = processes.rank
        samplers = (
            getattr(loader, "sampler", None),
            getattr(getattr(loader, "batch_sampler", None), "sampler", None),
        )
        # It has a part already.
        if step > 1 and any(isinstance(sampler, DistributedSampler) for sampler in samplers):
            wanted = wanted // step + (offset < wanted % step)
            step = 1
            offset = 0
            source = f"the part of {source} for this process"
        seen = 0
        for index, batch in enumerate(loader if wanted else ()):
            size = batch_size(batch)
            if index % step == offset:
                whole = seen + size <= wanted or not is_even(batch) or not self._run_alone(batch)
                yield batch if whole else take(batch, 0, wanted - seen)
            seen = min(seen + size, wanted)
            if seen == wanted:
                return
        if seen < wanted:
            rank_zero_warn(
                f"num_samples is {wanted}, but {source} has only {seen}. All of them are used."
            )

    def _run_alone(self, batch: Any) -> bool:
        """Whether the samples of a batch run alone."""
        with pruning_mode(self.module):
            return run_alone(self.predict, batch)

    def forward(self, batch: Any) -> object:
        """Run a batch through the module as Lightning's loops do, by its `calibration_step` if it has one."""
        return self._run(batch, "calibration_step")

    def predict(self, batch: Any) -> object:
        """Return the logits of a batch, or an output with them, by its `calibration_predictions` if it has one."""
        without_forward = [] if is_overridden("forward", self.module) else ["calibration_step"]
        return self._run(batch, "calibration_predictions", *without_forward)

    def _run(self, batch: Any, *names: str) -> object:
        batch = self.module._on_before_batch_transfer(
            self.trainer.precision_plugin.convert_input(batch)
        )
        batch = self.trainer.strategy.batch_to_device(batch)
        for name in names:
            if callable(step := getattr(self.module, name, None)):
                return step(batch)
        return forward_batch(self.module, batch)


def _find(
    trainer: L.Trainer, pl_module: L.LightningModule, dataloader: Iterable[Any] | None
) -> tuple[Any, str]:
    """Return the first calibration loader that exists, in the order that `PruningCallback` documents, and its name."""
    if dataloader is not None:
        return dataloader, "dataloader"
    datamodule: Any = getattr(trainer, "datamodule", None)
    for holder in (datamodule, pl_module):
        if callable(calibration_dataloader := getattr(holder, "calibration_dataloader", None)):
            return calibration_dataloader(), f"{type(holder).__name__}.calibration_dataloader()"
    if trainer.train_dataloader is not None:
        return _independent_copy(_single(trainer.train_dataloader, "train")), "the train dataloader"
    for holder in (datamodule, pl_module):
        if holder is not None and is_overridden("train_dataloader", holder):
            if holder is datamodule:
                holder.setup("fit")  # Lightning has set it up only for evaluation
            return _single(
                holder.train_dataloader(), "train"
            ), f"{type(holder).__name__}.train_dataloader()"
    for kind in ("val", "test", "predict"):
        if (loader := getattr(trainer, f"{kind}_dataloaders")) is not None:
            return _independent_copy(_single(loader, kind)), f"the {kind} dataloader"
    raise MisconfigurationException(
        "dataloader must be given, or calibration_dataloader() defined, since there is no other data to calibrate on."
    )


def _single(loaders: Any, kind: str) -> Any:
    if not isinstance(loaders, Mapping | list | tuple):
        return loaders
    if len(loaders) != 1:
        raise MisconfigurationException(
            f"dataloader must be given, or calibration_dataloader() defined, since there are {len(loaders)} {kind} "
            "dataloaders to calibrate on."
        )
    (loader,) = loaders.values() if isinstance(loaders, Mapping) else loaders
    return loader


_RANDOM_STATES = (
    Sampler,
    torch.Generator,
    np.random.Generator,
    np.random.RandomState,
    random.Random,
)


def _independent_copy(loader: Any) -> Any:
    """Copy a loader, but not its data, so that calibration does not advance Lightning's samplers and generators.

    The copy of a plain DataLoader yields the last, smaller batch, too, and shuffles by the seed alone.
    """
    private = copy.copy(loader)
    if not isinstance(loader, DataLoader):
        return private
    own = vars(private)
    memo = {id(loader.dataset): loader.dataset}  # DataLoader forbids to set its attributes
    for name, value in vars(loader).items():
        if name == "batch_sampler" or isinstance(value, _RANDOM_STATES):
            own[name] = copy.deepcopy(value, memo)
    own["_iterator"] = None
    if type(loader) is DataLoader and type(loader.batch_sampler) in (BatchSampler, NoneType):
        batches = private if loader.batch_sampler is None else own["batch_sampler"]
        own["drop_last"] = vars(batches)["drop_last"] = False
        if isinstance(batches.sampler, RandomSampler):
            own["generator"] = batches.sampler.generator = torch.Generator().manual_seed(
                torch.initial_seed()
            )
    return private


class ValidationLoop:
    """Collects statistics from the first batches of a validation loop, until they have `num_samples`."""

    def __init__(self, plan: Plan, num_samples: int) -> None:
        self.plan = plan
        self._samples_left = num_samples
        self.batch = ExitStack()
        self.calibration = PassiveCalibration(
            plan.model, plan.whole_model, plan.observed, plan.processes
        )

    def start_batch(self, batch: Any) -> None:
        """Collect while the batch runs, until `batch.close()`."""
        if self._samples_left > 0:  # of all processes
            self._samples_left -= batch_size(batch) * self.plan.processes.world_size
            self.batch.enter_context(self.calibration.collect(batch))
