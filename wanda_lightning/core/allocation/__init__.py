"""Allocations give each layer its sparsity, so that the parameter-weighted mean is the target.

An allocation says how the layers should differ; `match_target` moves all by one amount to the target, and on to sparsities
that the pattern can have.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from wanda_lightning.core.allocation.alpha import AlphaPruning, tail_exponent
from wanda_lightning.core.allocation.base import Allocation, DenseLayer, Uniform
from wanda_lightning.core.allocation.fisher import Fisher
from wanda_lightning.core.allocation.match_target import match_target
from wanda_lightning.core.allocation.owl import OWL
from wanda_lightning.core.allocation.per_layer import PerLayer

__all__ = [
    "ALLOCATIONS",
    "OWL",
    "Allocation",
    "AlphaPruning",
    "DenseLayer",
    "Fisher",
    "PerLayer",
    "Uniform",
    "match_target",
    "tail_exponent",
]

ALLOCATIONS: dict[str, Callable[[], Allocation]] = {
    "uniform": Uniform,
    "owl": OWL,
    "owl_layer": partial(OWL, per="layer"),
    "alpha": AlphaPruning,
    "alpha_layer": partial(AlphaPruning, per="layer"),
    "fisher": Fisher,
}
