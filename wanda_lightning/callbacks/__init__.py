"""The thin Lightning shell: when to prune, and keeping the zeros."""

from wanda_lightning.callbacks.keep_zeros import KeepZeros
from wanda_lightning.callbacks.pruning import MagnitudePrune, PruningCallback, WandaPrune

__all__ = ["KeepZeros", "MagnitudePrune", "PruningCallback", "WandaPrune"]
