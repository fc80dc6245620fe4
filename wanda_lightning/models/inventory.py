"""Every matrix of a model: layers to prune, in units, and skipped matrices, each with its reason."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from torch import nn

from wanda_lightning.models.layers import Layer


class SkipReason(str, Enum):
    """Why a matrix is left dense."""

    ADAPTER = "adapter"
    EMBEDDING = "embedding"
    OUTPUT_HEAD = "output_head"
    ROUTER = "router"
    STEM = "stem"
    TIED = "tied"
    DEPTHWISE = "depthwise"
    GROUPED = "grouped"
    QUANTIZED = "quantized"
    NO_SHAPE = "no_shape"
    UNSUPPORTED = "unsupported"
    PATTERN = "pattern"
    USER = "user"
    UNREACHED = "unreached"
    UNROUTED = "unrouted"
    INACTIVE = "inactive"

    @property
    def is_expected(self) -> bool:
        """Whether users expect that such a matrix is not pruned, or asked for it."""
        return self in _EXPECTED


_EXPECTED = {
    SkipReason.ADAPTER,
    SkipReason.EMBEDDING,
    SkipReason.OUTPUT_HEAD,
    SkipReason.ROUTER,
    SkipReason.STEM,
    SkipReason.TIED,
    SkipReason.USER,
}


@dataclass(frozen=True)
class SkippedMatrix:
    """A matrix that is left dense.

    Attributes:
        name: The layer's name, or the parameter's if it belongs to no layer.
        shape: As it is stored.
        reason: Why.
        detail: The reason in words.
    """

    name: str
    shape: tuple[int, ...]
    reason: SkipReason
    detail: str

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Unit:
    """Where calibration batches stop: a block, a layer, or (module None) the whole model."""

    name: str
    module: nn.Module | None
    layers: tuple[Layer, ...]


@dataclass(frozen=True)
class Inventory:
    """Every matrix of a model.

    Attributes:
        units: The layers to prune, in model order.
        skipped: All other matrices.
        blocks: For each layer to prune the name of its block; of a layer outside of all blocks its module's name.
    """

    units: tuple[Unit, ...]
    skipped: tuple[SkippedMatrix, ...]
    blocks: Mapping[str, str]

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All layers to prune, in model order."""
        return tuple(layer for unit in self.units for layer in unit.layers)

    def skipped_for(self, reason: SkipReason) -> tuple[SkippedMatrix, ...]:
        """The matrices that are skipped for a reason, the largest first."""
        return tuple(sorted((m for m in self.skipped if m.reason is reason), key=lambda matrix: -matrix.size))
