"""A pruning callback for each of the best-known methods."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from wanda_lightning.callbacks.pruning import PruningCallback
from wanda_lightning.callbacks.schedules import Schedule
from wanda_lightning.config import CommonChoices, Unpack
from wanda_lightning.core.criteria import Criterion, Magnitude, Wanda
from wanda_lightning.core.solvers import Solver, SparseGPT


class CallbackOptions(CommonChoices, total=False):
    """The arguments of `PruningCallback` that its subclasses pass on."""

    num_samples: int
    dataloader: Iterable[Any] | None
    keep_zeros: bool
    report_dir: str | Path | None
    report: str | Path | None
    at_step: int
    schedule: Schedule | None
    calibrate_on: Literal["calibration", "validation"]


class WandaPrune(PruningCallback):
    """Prune by weight magnitude times input norm, within each output row (Sun et al. 2024).

    It takes the arguments of `PruningCallback`, except `method` and `criterion`.
    """

    def __init__(
        self, sparsity: float = 0.5, *, solver: Solver | str | None = None, **options: Unpack[CallbackOptions]
    ) -> None:
        super().__init__(sparsity, method="wanda", criterion=Wanda(), solver=solver, **options)


class SparseGPTPrune(PruningCallback):
    """Prune column by column, and compensate in the later columns for each error (Frantar & Alistarh 2023).

    It takes the arguments of `PruningCallback`, except `method` and `solver`, and `dampening`: the number that is added
    to the diagonal of the Gram matrix, as a fraction of its mean.
    """

    def __init__(
        self,
        sparsity: float = 0.5,
        dampening: float = 0.01,
        *,
        criterion: Criterion | str | None = None,
        **options: Unpack[CallbackOptions],
    ) -> None:
        super().__init__(sparsity, method="sparsegpt", criterion=criterion, solver=SparseGPT(dampening), **options)


class MagnitudePrune(PruningCallback):
    """Prune the smallest weights of each layer (Han et al. 2015); only an allocation such as `OWL` reads data.

    It takes the arguments of `PruningCallback`, except `method` and `criterion`.
    """

    def __init__(
        self, sparsity: float = 0.5, *, solver: Solver | str | None = None, **options: Unpack[CallbackOptions]
    ) -> None:
        super().__init__(sparsity, method="magnitude", criterion=Magnitude(), solver=solver, **options)
