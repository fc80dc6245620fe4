"""Find what can be pruned in a model: layers, blocks and experts; also skipped matrices and padding."""

from wanda_lightning.models.find_layers import find_layers
from wanda_lightning.models.hidden_units import (
    HiddenUnits,
    RemovableUnits,
    hidden_units,
    removable_units,
    tied_tensors,
)
from wanda_lightning.models.inventory import Inventory, SkippedMatrix, SkipReason, Unit
from wanda_lightning.models.layers import Layer, is_plain
from wanda_lightning.models.module_names import adapted_module
from wanda_lightning.models.padding import TokenMask, fitting_mask, token_masks
from wanda_lightning.models.quantized import is_wrapper
from wanda_lightning.models.task import (
    causal_config,
    check_tokens,
    find_predictions,
    has_classes,
    number_of_embeddings,
    own_head,
    reads_images,
)

__all__ = [
    "HiddenUnits",
    "Inventory",
    "Layer",
    "RemovableUnits",
    "SkipReason",
    "SkippedMatrix",
    "TokenMask",
    "Unit",
    "adapted_module",
    "causal_config",
    "check_tokens",
    "find_layers",
    "find_predictions",
    "fitting_mask",
    "has_classes",
    "hidden_units",
    "is_plain",
    "is_wrapper",
    "number_of_embeddings",
    "own_head",
    "reads_images",
    "removable_units",
    "tied_tensors",
    "token_masks",
]
