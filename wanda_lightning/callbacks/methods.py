"""A pruning callback for each of the best-known methods."""

from __future__ import annotations

from typing import Any

from wanda_lightning.callbacks.pruning import PruningCallback
from wanda_lightning.core.criteria import Magnitude, Wanda
from wanda_lightning.core.solvers import SparseGPT


class WandaPrune(PruningCallback):
    """Prune by weight magnitude times input norm, within each output row (Sun et al. 2024).

    It takes the arguments of `PruningCallback`, except `method` and `criterion`.
    """

    def __init__(self, sparsity: float = 0.5, **options: Any) -> None:
        super().__init__(sparsity, method="wanda", criterion=Wanda(), **options)


class SparseGPTPrune(PruningCallback):
    """Prune column by column, and compensate in the later columns for each error (Frantar & Alistarh 2023).

    It takes the arguments of `PruningCallback`, except `method` and `solver`, and `dampening`: the number that is added
    to the diagonal of the Gram matrix, as a fraction of its mean.
    """

    def __init__(self, sparsity: float = 0.5, dampening: float = 0.01, **options: Any) -> None:
        super().__init__(sparsity, method="sparsegpt", solver=SparseGPT(dampening), **options)


class MagnitudePrune(PruningCallback):
    """Prune the smallest weights of each layer (Han et al. 2015); only an allocation such as `OWL` reads data.

    It takes the arguments of `PruningCallback`, except `method` and `criterion`.
    """

    def __init__(self, sparsity: float = 0.5, **options: Any) -> None:
        super().__init__(sparsity, method="magnitude", criterion=Magnitude(), **options)
