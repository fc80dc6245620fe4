"""What there is to prune in a model, and why the rest is left alone: all that knows layer types and model families."""

from wanda_lightning.models.experts import stacked_experts
from wanda_lightning.models.found import Skipped, Unit, Walk, left_by_pattern, low_coverage
from wanda_lightning.models.layers import Layer, LayerKind, layer_kinds
from wanda_lightning.models.meta import meta_model
from wanda_lightning.models.padding import TokenMask, fitting_mask, token_masks
from wanda_lightning.models.reasons import is_wrapper
from wanda_lightning.models.running import calibrating, free_memory
from wanda_lightning.models.walk import GRANULARITIES, Granularity, walk

__all__ = [
    "GRANULARITIES",
    "Granularity",
    "Layer",
    "LayerKind",
    "Skipped",
    "TokenMask",
    "Unit",
    "Walk",
    "calibrating",
    "fitting_mask",
    "free_memory",
    "is_wrapper",
    "layer_kinds",
    "left_by_pattern",
    "low_coverage",
    "meta_model",
    "stacked_experts",
    "token_masks",
    "walk",
]
