"""Solvers give the final weights of a layer, zeros included.

A solver gets criterion *and* pattern, because some choose and update column block by column block; "score, keep, zero"
is the special case `ZeroOut`.
"""

from wanda_lightning.core.solvers.admm import ADMM
from wanda_lightning.core.solvers.base import Solver, mask_, masked
from wanda_lightning.core.solvers.refit import Refit
from wanda_lightning.core.solvers.sparsegpt import SparseGPT
from wanda_lightning.core.solvers.zero_out import ZeroOut

__all__ = [
    "ADMM",
    "SOLVERS",
    "Refit",
    "Solver",
    "SparseGPT",
    "ZeroOut",
    "mask_",
    "masked",
]

SOLVERS: dict[str, type[Solver]] = {
    "zero_out": ZeroOut,
    "sparsegpt": SparseGPT,
    "refit": Refit,
    "admm": ADMM,
}
