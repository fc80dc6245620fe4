"""The inventory of a model: layers to prune, grouped into units, and skipped matrices with reasons."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from torch import nn

from wanda_lightning.models.layers import Layer


class SkipReason(str, Enum):
    """Reasons to leave a matrix dense."""

    ADAPTER = "adapter"
    EMBEDDING = "embedding"
    OUTPUT_HEAD = "output_head"
    ROUTER = "router"
    STEM = "stem"
    TIED = "tied"
    DEPTHWISE = "depthwise"
    GROUPED = "grouped"  # in reports of version 0.2
    QUANTIZED = "quantized"
    NO_SHAPE = "no_shape"
    UNSUPPORTED = "unsupported"
    PATTERN = "pattern"
    USER = "user"
    UNREACHED = "unreached"
    UNROUTED = "unrouted"
    INACTIVE = "inactive"
    UNCOUPLED = "uncoupled"

    @property
    def is_expected(self) -> bool:
        """Whether users expect that such a matrix stays dense, or asked for it."""
        return self.value in ("adapter", "embedding", "output_head", "router", "stem", "tied", "user", "uncoupled")


@dataclass(frozen=True)
class SkippedMatrix:
    """A matrix that is left dense."""

    name: str  # of the layer, or of the parameter if it belongs to no layer
    shape: tuple[int, ...]  # as stored
    reason: SkipReason
    detail: str  # the reason in words

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Unit:
    """A part of the model at which calibration batches stop: a block, a layer, or (module None) the whole model."""

    name: str
    module: nn.Module | None
    layers: tuple[Layer, ...]


@dataclass(frozen=True)
class Inventory:
    """Every matrix of a model."""

    units: tuple[Unit, ...]  # the layers to prune, in model order
    skipped: tuple[SkippedMatrix, ...]  # all other matrices
    blocks: Mapping[str, str]  # by layer: the name of its block, or of its module if it lies in no block

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All layers to prune, in model order."""
        return tuple(layer for unit in self.units for layer in unit.layers)

    def skipped_for(self, reason: SkipReason) -> tuple[SkippedMatrix, ...]:
        """Return the matrices that are skipped for a reason, largest first."""
        return tuple(sorted((m for m in self.skipped if m.reason is reason), key=lambda matrix: -matrix.size))
