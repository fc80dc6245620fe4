"""Data loaders in a Trainer: training that a resumed run takes up in the middle, and no advice about workers."""

import warnings
from collections.abc import Iterator
from itertools import islice
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from wanda_lightning.common.aliases import Kwargs


class ResumableLoader(DataLoader[Any]):
    """A loader whose run may be resumed in the middle of an epoch, so that no batch comes twice.

    The seed and the Trainer's epoch give the order, and the Trainer's progress the number of batches to skip. They are
    read with the first batch: Lightning may create the iterator before it restores its progress.
    """

    def __init__(self, *args: Any, trainer: L.Trainer | None, seed: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Public, like all arguments: Lightning reads them when it rebuilds the loader to add a DistributedSampler.
        self.trainer = trainer
        self.seed = seed

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield the batches of an epoch, or those that are left of it."""
        skip = 0
        trainer = self.trainer
        if trainer and trainer.training:
            self.generator.manual_seed(self.seed + trainer.current_epoch)
            skip = trainer.fit_loop.batch_idx + 1
        yield from islice(super().__iter__(), skip, None)

    def state_dict(self) -> Kwargs:
        """Return nothing: the method tells Lightning that the loader can be resumed."""
        return {}

    def load_state_dict(self, state: Kwargs) -> None:
        """Do nothing: the Trainer restores its progress itself."""


def training_loader(data: Any, dataset: Any, **options: Any) -> ResumableLoader:
    """Return the loader of a data module for training.

    Unless `shuffle` is false, it shuffles anew in each epoch, by the seed of the module.
    """
    options = {"shuffle": True, **options}
    return ResumableLoader(
        dataset,
        data.batch_size,
        generator=torch.Generator().manual_seed(data.seed),
        trainer=data.trainer,
        seed=data.seed,
        **options,
    )


def silence_worker_advice() -> None:
    """Stop Lightning from recommending workers, with which a loader over data in memory is slower; it has no option."""
    warnings.filterwarnings("ignore", message=r"The '\w+' does not have many workers")
