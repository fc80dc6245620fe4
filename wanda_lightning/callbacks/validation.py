"""Calibrate on a validation loop of Lightning."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from torch import nn

from wanda_lightning.calibration.batches import batch_size
from wanda_lightning.calibration.observer import PassiveCalibration
from wanda_lightning.config import PruningConfig
from wanda_lightning.engine.plan import make_plan
from wanda_lightning.engine.prune import prune_collected
from wanda_lightning.parallel import Processes
from wanda_lightning.report import PruningReport


class ValidationLoop:
    """Collects statistics from the first batches of one validation loop, and prunes the model with them.

    Each process runs a part of the samples. Collection stops after `num_samples` samples; batches are not cut.
    """

    def __init__(self, config: PruningConfig, model: nn.Module, processes: Processes, num_samples: int) -> None:
        with processes.fail_together():
            self._plan = make_plan(config, model, processes)
        self._calibration = PassiveCalibration(model, self._plan.whole_model, self._plan.observed, processes)
        self._samples_left = num_samples
        self._world_size = processes.world_size
        self._batch = ExitStack()

    def start_batch(self, batch: Any) -> None:
        """Collect while the batch runs, until `end_batch`."""
        if self._samples_left > 0:
            self._samples_left -= batch_size(batch) * self._world_size
            self._batch.enter_context(self._calibration.collect(batch))

    def end_batch(self) -> None:
        """Stop collecting; called after an error as well."""
        self._batch.close()

    def prune(self) -> PruningReport:
        """Prune with the collected statistics."""
        return prune_collected(self._plan, self._calibration)
