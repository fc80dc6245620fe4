"""The calibration batches of a callback: find them, and run one through the module."""

import copy
import random
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from types import NoneType
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, Sampler
from torch.utils.data.distributed import DistributedSampler

from wanda_lightning.calibration.batches import batch_size, is_even, run_alone, take
from wanda_lightning.calibration.observer import PassiveCalibration
from wanda_lightning.calibration.pruning_mode import pruning_mode
from wanda_lightning.calibration.samples import forward_batch
from wanda_lightning.loop.plan import Plan
from wanda_lightning.parallel import Processes


@dataclass
class CalibrationData:
    """The first `num_samples` samples of the calibration data, and how a batch of them runs through the module.

    With several processes, each gets a part of the samples: every `world_size`-th batch if the loader yields the same
    batches in each process, or the first samples if the loader has a `DistributedSampler`, as Lightning's loaders have.

    Raises:
        MisconfigurationException: Without data, or with more than one loader.
    """

    trainer: Trainer
    module: LightningModule
    dataloader: Iterable[Any] | None
    num_samples: int
    processes: Processes

    def batches(self) -> Iterator[Any]:
        """Yield the samples in the batches that the loader makes; warn if there are fewer.

        All processes continue with the random state of the first, so that their loaders shuffle in the same order.
        """
        loader, name = self._find()
        yield from self._first_samples(loader, name)

    def trial_batches(self) -> Iterator[Any] | None:
        """Return the same batches from a copy of the loader, with the same errors; None for data that are used up."""
        loader, name = self._find()
        dataset = getattr(loader, "dataset", None)
        if isinstance(loader, Iterator) or isinstance(dataset, IterableDataset):
            return None  # a copy would share its state
        return self._first_samples(_independent_copy(loader), name)

    def _first_samples(self, loader: Any, name: str) -> Iterator[Any]:
        if self.processes.world_size > 1:
            torch.set_rng_state(self.processes.broadcast(torch.get_rng_state(), 0))

        # Of a loader that is the same in all processes, this process gets every `step`-th batch.
        step = self.processes.world_size
        offset = self.processes.rank
        wanted = self.num_samples
        if step > 1 and _is_divided(loader):
            wanted = wanted // step + (offset < wanted % step)
            step = 1
            offset = 0
            name = f"the part of {name} for this process"
        if wanted == 0:
            return

        seen = 0
        for index, batch in enumerate(loader):
            if index % step == offset:
                yield self._cut(batch, wanted - seen)
            seen += batch_size(batch)
            if seen >= wanted:
                return
        rank_zero_warn(
            f"num_samples is {wanted}, but {name} has only {seen}. All of them are used."
        )

    def _cut(self, batch: Any, size: int) -> Any:
        """Return the first samples of a batch, or the whole batch if its samples do not run alone."""
        if batch_size(batch) <= size or not is_even(batch):
            return batch
        with pruning_mode(self.module):
            can_cut = run_alone(self.predict, batch)
        return take(batch, 0, size) if can_cut else batch

    def forward(self, batch: Any) -> object:
        """Run a batch through the module as Lightning's loops do, by its `calibration_step` if it has one."""
        return self._run(batch, "calibration_step")

    def predict(self, batch: Any) -> object:
        """Return the logits of a batch, or an output with them, by its `calibration_predictions` if it has one."""
        if is_overridden("forward", self.module):
            return self._run(batch, "calibration_predictions")
        return self._run(batch, "calibration_predictions", "calibration_step")

    def _run(self, batch: Any, *names: str) -> object:
        """Run a batch by the first method of the module with one of these names, else by the module itself."""
        batch = self.trainer.precision_plugin.convert_input(batch)
        # The hook of the datamodule if it has its own, else that of the module, as in Lightning.
        for holder in self._holders:
            if is_overridden("on_before_batch_transfer", holder):
                batch = holder.on_before_batch_transfer(batch, 0)
                break
        batch = self.trainer.strategy.batch_to_device(batch)
        for name in names:
            method = getattr(self.module, name, None)
            if callable(method):
                return method(batch)
        return forward_batch(self.module, batch)

    @property
    def _holders(self) -> tuple[Any, Any]:
        """The datamodule, or None, and the module, which may both have loaders and hooks."""
        return getattr(self.trainer, "datamodule", None), self.module

    def _find(self) -> tuple[Any, str]:
        """Return the first calibration loader that exists, in the order of `PruningCallback`, with a name for it."""
        if self.dataloader is not None:
            return self.dataloader, "dataloader"

        for holder in self._holders:
            make_loader = getattr(holder, "calibration_dataloader", None)
            if callable(make_loader):
                return make_loader(), f"{type(holder).__name__}.calibration_dataloader()"

        if self.trainer.train_dataloader is not None:
            loader = _single(self.trainer.train_dataloader, "train")
            return _independent_copy(loader), "the train dataloader"

        # In `setup`, Lightning has made no dataloader yet.
        is_fit = self.trainer.state.fn == "fit"
        if is_fit and (source := self.trainer.fit_loop._data_source).is_defined():
            return _single(source.dataloader(), "train"), "the train dataloader"

        # In an evaluation, it makes no train dataloader.
        for holder in self._holders:
            if is_overridden("train_dataloader", holder):
                if holder is not self.module:
                    holder.setup("fit")  # Lightning has set it up only for the evaluation
                loader = _single(holder.train_dataloader(), "train")
                return loader, f"{type(holder).__name__}.train_dataloader()"

        for kind in ("val", "test", "predict"):
            loaders = getattr(self.trainer, f"{kind}_dataloaders")
            if loaders is not None:
                return _independent_copy(_single(loaders, kind)), f"the {kind} dataloader"
        loop: Any = None if is_fit else self.trainer._active_loop
        if loop is not None and loop._data_source.is_defined():
            return _single(loop._data_source.dataloader(), "evaluation"), "the dataloader"

        raise MisconfigurationException(
            "dataloader must be given, or calibration_dataloader() defined, since there is no other data to calibrate "
            "on."
        )


def _single(loaders: Any, kind: str) -> Any:
    """Return the only loader of a collection; refuse several."""
    several = CombinedLoader(loaders).flattened
    if len(several) != 1:
        raise MisconfigurationException(
            f"dataloader must be given, or calibration_dataloader() defined, since there are {len(several)} {kind} "
            "dataloaders to calibrate on."
        )
    return several[0]


def _is_divided(loader: Any) -> bool:
    """Whether a loader reads only the part of the data for this process."""
    holders = (loader, getattr(loader, "batch_sampler", None))
    return any(
        isinstance(getattr(holder, "sampler", None), DistributedSampler) for holder in holders
    )


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
    copied = copy.copy(loader)
    if not isinstance(loader, DataLoader):
        return copied

    # A DataLoader forbids to set most attributes, but not the entries of its dictionary.
    attributes = vars(copied)
    memo = {id(loader.dataset): loader.dataset}  # as if it were copied already
    for name, value in vars(loader).items():
        if name == "batch_sampler" or isinstance(value, _RANDOM_STATES):
            attributes[name] = copy.deepcopy(value, memo)
    attributes["_iterator"] = None  # the running workers, if they are persistent

    batch_sampler = copied.batch_sampler
    if type(loader) is not DataLoader or type(batch_sampler) not in (BatchSampler, NoneType):
        return copied  # a sampler or a loader of the user may mean something else by these
    sampler = copied.sampler
    attributes["drop_last"] = False
    if batch_sampler is not None:
        batch_sampler.drop_last = False
        sampler = batch_sampler.sampler
    if isinstance(sampler, RandomSampler):
        sampler.generator = torch.Generator().manual_seed(torch.initial_seed())
        attributes["generator"] = sampler.generator
    return copied


class ValidationStatistics:
    """Collects statistics from the first batches of a validation loop, until they have `num_samples` samples."""

    def __init__(self, plan: Plan, num_samples: int) -> None:
        self.plan = plan
        self.calibration = PassiveCalibration(
            plan.model, plan.whole_model, plan.observed, plan.processes
        )
        self._samples_left = num_samples  # over all processes
        self._batch = ExitStack()

    def start_batch(self, batch: Any) -> None:
        """Collect while the batch runs, until `end_batch()`."""
        if self._samples_left > 0:
            self._samples_left -= batch_size(batch) * self.plan.processes.world_size
            self._batch.enter_context(self.calibration.collect(batch))

    def end_batch(self) -> None:
        """Stop collecting."""
        self._batch.close()
