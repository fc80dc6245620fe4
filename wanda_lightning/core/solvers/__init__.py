"""Solvers choose which weights of a layer become zero, and compute its final weights.

A solver receives the whole selection (criterion, pattern and sparsity) because some solvers alternate between choosing
a block of columns and updating the weights. `ZeroOut` scores once and sets weights to zero.
"""

from wanda_lightning.core.solvers.admm import ADMM as ADMM
from wanda_lightning.core.solvers.refit import Refit as Refit
from wanda_lightning.core.solvers.solver import Solver as Solver, ZeroOut as ZeroOut
from wanda_lightning.core.solvers.sparsegpt import SparseGPT as SparseGPT
