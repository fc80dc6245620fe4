"""Allocations give each layer its sparsity.

An allocation decides how the layers differ. `match_target` shifts all sparsities until their mean, weighted by the
number of weights, is the target, and rounds them to sparsities that the pattern can have.
"""

from wanda_lightning.core.allocation.allocation import (
    Allocation as Allocation,
    DenseLayer as DenseLayer,
    GradientLimit as GradientLimit,
    Sparsities as Sparsities,
    Uniform as Uniform,
    UnitLayer as UnitLayer,
    match_target as match_target,
)
from wanda_lightning.core.allocation.fisher import Fisher as Fisher
from wanda_lightning.core.allocation.owl import OWL as OWL
from wanda_lightning.core.allocation.per_layer import PerLayer as PerLayer
