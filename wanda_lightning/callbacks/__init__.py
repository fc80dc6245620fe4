"""The thin Lightning shell: when to prune, and keeping the zeros."""

from wanda_lightning.callbacks.keep_zeros import KeepZeros
from wanda_lightning.callbacks.methods import MagnitudePrune, SparseGPTPrune, WandaPrune
from wanda_lightning.callbacks.pruning import PruningCallback
from wanda_lightning.callbacks.save import SavePretrained
from wanda_lightning.callbacks.schedules import Cubic, Linear, OneShot, Schedule

__all__ = [
    "Cubic",
    "KeepZeros",
    "Linear",
    "MagnitudePrune",
    "OneShot",
    "PruningCallback",
    "SavePretrained",
    "Schedule",
    "SparseGPTPrune",
    "WandaPrune",
]
