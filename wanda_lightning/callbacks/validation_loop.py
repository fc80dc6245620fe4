"""Calibrate on Lightning's own validation loop, without an extra pass."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from wanda_lightning.callbacks.batches import batch_size
from wanda_lightning.pruning import PassiveCalibration
from wanda_lightning.report import PruningReport


class ValidationLoop:
    """Collects statistics from the first batches of one validation loop.

    Args:
        calibration: Collects the statistics of each batch.
        num_samples: Collection stops with the batch that reaches this many samples.
        world_size: Number of processes that run the loop, each on a part of the samples.
    """

    def __init__(self, calibration: PassiveCalibration, num_samples: int, world_size: int) -> None:
        self._calibration, self._num_samples, self._world_size = calibration, num_samples, world_size
        self._samples = 0
        self._batch = ExitStack()

    def start_batch(self, batch: Any) -> None:
        """Collect while the batch runs, until `end_batch`."""
        if self._samples < self._num_samples:
            self._samples += batch_size(batch) * self._world_size
            self._batch.enter_context(self._calibration.batch(batch))

    def end_batch(self) -> None:
        """Stop collecting, also after an error."""
        self._batch.close()

    def prune(self) -> PruningReport:
        """Prune with the statistics collected."""
        return self._calibration.prune()
