"""The pruning callback under the names of its methods."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from wanda_lightning.callbacks.pruning import PruningCallback
from wanda_lightning.callbacks.schedules import Schedule
from wanda_lightning.core.allocation import Allocation, Uniform
from wanda_lightning.core.criteria import Magnitude, Wanda
from wanda_lightning.core.patterns import Pattern, Unstructured
from wanda_lightning.core.solvers import SparseGPT


class WandaPrune(PruningCallback):
    """Prune by weight magnitude times input norm, within each output row (Sun et al. 2024).

    Takes what `PruningCallback` takes; the criterion is `Wanda`.
    """

    def __init__(
        self,
        sparsity: float = 0.5,
        pattern: Pattern | str = Unstructured(),
        allocation: Allocation | str = Uniform(),
        sequential: str = "block",
        skip: Sequence[str] = (),
        only: Sequence[str] = (),
        include_grouped: bool = False,
        num_samples: int = 128,
        dataloader: Iterable[Any] | None = None,
        keep_zeros: bool = True,
        report_dir: str | Path | None = None,
        at_step: int = 0,
        schedule: Schedule | None = None,
        calibrate_on: Literal["calibration", "validation"] = "calibration",
        min_expert_tokens: int = 32,
    ) -> None:
        super().__init__(
            sparsity,
            Wanda(),
            pattern,
            allocation,
            sequential=sequential,
            skip=skip,
            only=only,
            include_grouped=include_grouped,
            num_samples=num_samples,
            dataloader=dataloader,
            keep_zeros=keep_zeros,
            report_dir=report_dir,
            at_step=at_step,
            schedule=schedule,
            calibrate_on=calibrate_on,
            min_expert_tokens=min_expert_tokens,
        )


class SparseGPTPrune(PruningCallback):
    """Prune column by column, each making up for what those before it lost (Frantar & Alistarh 2023).

    Takes what `PruningCallback` takes; the solver is `SparseGPT`, which compares a layer's weights block of columns by
    block of columns.

    Args:
        dampening: Of the Gram matrix, as a share of its mean diagonal.
    """

    def __init__(
        self,
        sparsity: float = 0.5,
        pattern: Pattern | str = Unstructured(group="layer"),
        allocation: Allocation | str = Uniform(),
        sequential: str = "block",
        skip: Sequence[str] = (),
        only: Sequence[str] = (),
        include_grouped: bool = False,
        num_samples: int = 128,
        dataloader: Iterable[Any] | None = None,
        keep_zeros: bool = True,
        report_dir: str | Path | None = None,
        at_step: int = 0,
        schedule: Schedule | None = None,
        calibrate_on: Literal["calibration", "validation"] = "calibration",
        min_expert_tokens: int = 32,
        dampening: float = 0.01,
    ) -> None:
        super().__init__(
            sparsity,
            pattern=pattern,
            allocation=allocation,
            solver=SparseGPT(dampening),
            sequential=sequential,
            skip=skip,
            only=only,
            include_grouped=include_grouped,
            num_samples=num_samples,
            dataloader=dataloader,
            keep_zeros=keep_zeros,
            report_dir=report_dir,
            at_step=at_step,
            schedule=schedule,
            calibrate_on=calibrate_on,
            min_expert_tokens=min_expert_tokens,
        )


class MagnitudePrune(PruningCallback):
    """Prune the smallest weights of each layer, without calibration data (which only the allocation `OWL` asks for).

    Takes what `PruningCallback` takes; the criterion is `Magnitude`, compared over the whole layer by default.
    """

    def __init__(
        self,
        sparsity: float = 0.5,
        pattern: Pattern | str = Unstructured(group="layer"),
        allocation: Allocation | str = Uniform(),
        skip: Sequence[str] = (),
        only: Sequence[str] = (),
        include_grouped: bool = False,
        keep_zeros: bool = True,
        report_dir: str | Path | None = None,
        at_step: int = 0,
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__(
            sparsity,
            Magnitude(),
            pattern,
            allocation,
            skip=skip,
            only=only,
            include_grouped=include_grouped,
            keep_zeros=keep_zeros,
            report_dir=report_dir,
            at_step=at_step,
            schedule=schedule,
        )
