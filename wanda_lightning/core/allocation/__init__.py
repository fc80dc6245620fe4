"""Allocations give each layer its sparsity.

An allocation decides how the layers differ. `match_target` shifts all sparsities until their mean, weighted by the
number of weights, is the target, and rounds them to sparsities that the pattern can have.
"""

from wanda_lightning.core.allocation.allocation import Allocation, DenseLayer, GradientLimit, Uniform, UnitLayer
from wanda_lightning.core.allocation.blocks import OWL, AlphaPruning, tail_exponent
from wanda_lightning.core.allocation.fisher import Fisher
from wanda_lightning.core.allocation.match_target import match_target
from wanda_lightning.core.allocation.per_layer import PerLayer

__all__ = [
    "OWL",
    "Allocation",
    "AlphaPruning",
    "DenseLayer",
    "Fisher",
    "GradientLimit",
    "PerLayer",
    "Uniform",
    "UnitLayer",
    "match_target",
    "tail_exponent",
]
