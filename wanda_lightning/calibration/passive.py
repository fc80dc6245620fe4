"""Collect statistics from forward passes that run anyway, at no extra cost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from wanda_lightning.calibration.calibrate import uncompiled
from wanda_lightning.calibration.mode import calibration_mode
from wanda_lightning.calibration.observer import Observer
from wanda_lightning.core.statistics import InputStatistics
from wanda_lightning.models import TokenMask, Unit, token_masks
from wanda_lightning.parallel import Processes


class PassiveCalibration:
    """Collects statistics of all layers of a dense model, for example during a validation loop.

    Args:
        model: The model.
        unit: All layers of the model.
        needs: Names of the statistics.
        min_expert_tokens: See `Observer`.
        processes: All processes that calibrate together.

    Attributes:
        observer: Collects the statistics.
    """

    def __init__(
        self, model: nn.Module, unit: Unit, needs: frozenset[str], min_expert_tokens: int, processes: Processes
    ) -> None:
        self._model, self._unit, self._processes = model, unit, processes
        self._masks: list[tuple[TokenMask, ...] | None] = []
        self.observer = Observer(needs, self._masks, processes=processes, min_expert_tokens=min_expert_tokens)

    @contextmanager
    def collect(self, batch: Any) -> Iterator[None]:
        """Read the inputs of all layers while the batch runs."""
        self._masks.append(token_masks(self._model, batch))
        with (
            calibration_mode(self._model),
            uncompiled(),
            self.observer.collect(self._unit, len(self._masks) - 1),
        ):
            yield

    def finish(self) -> tuple[dict[str, InputStatistics], int]:
        """Return the statistics by layer, and the number of batches of all processes.

        Raises:
            ValueError: If there was no batch, or an activation held NaN or infinity.
        """
        statistics = self.observer.finish(self._unit)
        batches = torch.tensor(len(self._masks))
        self._processes.all_reduce_sum([batches])
        if not batches:
            raise ValueError("calibrate_on='validation' needs batches that run through the model, but none did.")
        return statistics, int(batches)
