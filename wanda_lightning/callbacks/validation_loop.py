"""Calibrate on Lightning's own validation loop, without an extra pass."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from wanda_lightning.calibration.passive import PassiveCalibration
from wanda_lightning.callbacks.batches import batch_size
from wanda_lightning.plan import Plan
from wanda_lightning.pruning import prune_collected
from wanda_lightning.report import PruningReport


class ValidationLoop:
    """Collects statistics from the first batches of one validation loop.

    Args:
        plan: What will be pruned.
        num_samples: Collection stops with the batch that reaches this many samples.
    """

    def __init__(self, plan: Plan, num_samples: int) -> None:
        self._plan, self._num_samples = plan, num_samples
        self._calibration = PassiveCalibration(
            plan.model, plan.whole_model, plan.observed, plan.config.min_expert_tokens, plan.processes
        )
        self._samples = 0
        self._batch = ExitStack()

    def start_batch(self, batch: Any) -> None:
        """Collect while the batch runs, until `end_batch`."""
        if self._samples < self._num_samples:
            self._samples += batch_size(batch) * self._plan.processes.world_size
            self._batch.enter_context(self._calibration.collect(batch))

    def end_batch(self) -> None:
        """Stop collecting, also after an error."""
        self._batch.close()

    def prune(self) -> PruningReport:
        """Prune with the statistics collected."""
        return prune_collected(self._plan, self._calibration)
