"""Solvers compute the final weights of a layer, zeros included.

A solver receives the whole selection (criterion, pattern and sparsity), because some choose and update column block by
column block. `ZeroOut` is the special case that scores once and sets weights to zero.
"""

from wanda_lightning.core.solvers.admm import ADMM
from wanda_lightning.core.solvers.base import Solver
from wanda_lightning.core.solvers.refit import Refit
from wanda_lightning.core.solvers.sparsegpt import SparseGPT
from wanda_lightning.core.solvers.zero_out import ZeroOut

__all__ = [
    "ADMM",
    "Refit",
    "Solver",
    "SparseGPT",
    "ZeroOut",
]
