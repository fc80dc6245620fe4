"""Find what can be pruned in a model: layers, blocks and experts; also skipped matrices and padding."""

from wanda_lightning.models.inventory import (
    Inventory as Inventory,
    SkippedMatrices as SkippedMatrices,
    SkippedMatrix as SkippedMatrix,
    Stop as Stop,
    Stops as Stops,
    count_parameters as count_parameters,
    find_layers as find_layers,
    group_by_stop as group_by_stop,
    number_of_parameters as number_of_parameters,
)
from wanda_lightning.models.layers import (
    Layer as Layer,
    ReadWeight as ReadWeight,
    adapted_module as adapted_module,
)
from wanda_lightning.models.padding import (
    TokenMask as TokenMask,
    fitting_mask as fitting_mask,
    token_masks as token_masks,
)
from wanda_lightning.models.skip_reasons import SkipReason as SkipReason, has_hooks as has_hooks
from wanda_lightning.models.task import (
    causal_config as causal_config,
    check_tokens as check_tokens,
    find_predictions as find_predictions,
    has_classes as has_classes,
    has_vectors as has_vectors,
    head_within as head_within,
    reads_images as reads_images,
)
from wanda_lightning.models.tied import (
    own_tensors as own_tensors,
    repeated_parameters as repeated_parameters,
    tied_tensors as tied_tensors,
)
