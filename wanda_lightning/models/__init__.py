"""What there is to prune in a model, and why the rest is left alone: all that knows layer types and model families."""

from wanda_lightning.calibration.mode import calibration_mode, free_memory
from wanda_lightning.models.experts import stacked_experts
from wanda_lightning.models.find_layers import SEQUENTIAL_CHOICES, SequentialChoice, find_layers
from wanda_lightning.models.from_config import model_from_config
from wanda_lightning.models.inventory import Inventory, Skipped, Unit, left_by_pattern, low_coverage
from wanda_lightning.models.layers import Layer, LayerKind, layer_kinds
from wanda_lightning.models.padding import TokenMask, fitting_mask, token_masks
from wanda_lightning.models.quantized import is_quantized, is_wrapper

__all__ = [
    "SEQUENTIAL_CHOICES",
    "Inventory",
    "Layer",
    "LayerKind",
    "SequentialChoice",
    "Skipped",
    "TokenMask",
    "Unit",
    "calibration_mode",
    "find_layers",
    "fitting_mask",
    "free_memory",
    "is_quantized",
    "is_wrapper",
    "layer_kinds",
    "left_by_pattern",
    "low_coverage",
    "model_from_config",
    "stacked_experts",
    "token_masks",
]
