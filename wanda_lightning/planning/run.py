"""One pruning run: what is pruned, with which samples, where the weights are, and what has happened so far."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from wanda_lightning.calibration.lockstep import Passed
from wanda_lightning.calibration.pruning_mode import RestoredBuffers
from wanda_lightning.calibration.samples import Samples
from wanda_lightning.common.wording import quantity
from wanda_lightning.core.selection import Selection
from wanda_lightning.models import Layer, SkippedMatrix, SkipReason
from wanda_lightning.planning.plan import Plan
from wanda_lightning.planning.removal import Removal
from wanda_lightning.planning.weight_store import WeightStore
from wanda_lightning.report import BatchNormCorrection, Permuted, PrunedLayer, Training


class Clock(dict[str, float]):
    """Seconds by stage."""

    @contextmanager
    def timed(self, stage: str, is_reported: bool = True) -> Iterator[None]:
        """Add the time of this block to a stage of the report; a stage that does nothing is left out."""
        started = time.perf_counter()
        try:
            yield
        finally:
            if is_reported:
                self[stage] = self.get(stage, 0.0) + time.perf_counter() - started


@dataclass
class Done:
    """The records of the layers so far, by name. An error message uses them, too, so they are added at each write."""

    layers: dict[str, PrunedLayer] = field(default_factory=dict)  # in the order of pruning
    skipped: dict[str, SkippedMatrix] = field(default_factory=dict)  # left dense
    # Number of tokens of each expert that was pruned with the statistics of all experts of its module.
    few_tokens: dict[str, int] = field(default_factory=dict)
    # Hidden units that are zero, by the layer that reads them.
    zero_units: dict[str, int] = field(default_factory=dict)
    # Stops that the model called after they were pruned.
    passed: Passed = field(default_factory=Passed)


@dataclass(frozen=True)
class Run:
    """One pruning run. Each stage returns a new value with what it found."""

    plan: Plan
    samples: Samples
    store: WeightStore
    removal: Removal
    progress: bool = False  # whether to show bars
    buffers: RestoredBuffers | None = None  # while stops are pruned
    clock: Clock = field(default_factory=Clock)
    done: Done = field(default_factory=Done)
    # How the weights of each layer are selected; empty until the sparsities are allocated.
    selections: Mapping[str, Selection] = field(default_factory=dict)
    permuted: Permuted | None = None
    not_corrected: str = ""  # why BatchNorm layers were not corrected; empty if they were
    batch_norm: BatchNormCorrection | None = None
    training: Training | None = None  # of the whole model

    def describe_progress(self) -> str:
        """Say, for an error, how many layers are pruned already; return nothing if none is."""
        if not self.done.layers:
            return ""
        pruned = quantity(len(self.done.layers), "layer is", "layers are")
        return f"{pruned} already pruned; the others are dense. {self.store.advice}"


def unreached(layer: Layer) -> SkippedMatrix:
    """Return the record of a layer that no calibration batch called."""
    return SkippedMatrix(
        layer.name, layer.stored_shape, SkipReason.UNREACHED, "no calibration batch called it"
    )
