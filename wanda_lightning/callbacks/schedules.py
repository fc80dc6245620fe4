"""When to prune while training, and how far: the stages of a schedule, in optimizer steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass


class Schedule(ABC):
    """At which optimizer steps to prune, and to which share of the final sparsity.

    A stage `(step, share)` prunes as soon as `step` optimizer steps are done, to `share * sparsity`. Steps rise, shares
    do not fall, and the last share is 1. Where layers differ in sparsity (`OWL`, `AlphaPruning`, `PerLayer`), so do the
    shares of each; no layer's sparsity falls.
    """

    @property
    @abstractmethod
    def stages(self) -> tuple[tuple[int, float], ...]:
        """All stages, in order."""

    def share(self, step: int) -> float | None:
        """The share of the final sparsity that is due after so many optimizer steps; None before the first stage."""
        return next((share for stage, share in reversed(self.stages) if stage <= step), None)

    def check(self) -> None:
        """Refuse stages that are out of order.

        Raises:
            ValueError: If there are none, steps do not rise, a share falls or leaves (0, 1], or the last is not 1.
        """
        steps, shares = [step for step, _ in self.stages], [share for _, share in self.stages]
        if not steps or steps[0] < 0 or steps != sorted(set(steps)):
            raise ValueError(f"a schedule prunes at steps that rise from 0 or later, but {self} has {steps}")
        if not all(share > 0 for share in shares) or shares != sorted(shares) or shares[-1] != 1:
            raise ValueError(
                f"sparsity never decreases, and ends at what was asked for: the shares of {self} should rise to 1, "
                f"but they are {shares}"
            )


@dataclass(frozen=True)
class OneShot(Schedule):
    """Everything at once.

    Attributes:
        step: Optimizer steps before it.
    """

    step: int = 0

    @property
    def stages(self) -> tuple[tuple[int, float], ...]:
        """One stage."""
        return ((self.step, 1.0),)


@dataclass(frozen=True)
class LinearSchedule(Schedule):
    """Sparsity rises by the same amount at each stage.

    Attributes:
        start_step: Optimizer steps at which it is still 0.
        end_step: Optimizer steps at which it is what was asked for.
        every: Optimizer steps between stages.
    """

    start_step: int
    end_step: int
    every: int

    def __post_init__(self) -> None:
        if not (0 <= self.start_step < self.end_step and self.every >= 1):
            raise ValueError(
                "a schedule needs 0 <= start_step < end_step and every >= 1, but it has "
                f"start_step={self.start_step}, end_step={self.end_step}, every={self.every}"
            )

    @property
    def stages(self) -> tuple[tuple[int, float], ...]:
        """Every `every` steps after `start_step`, and at `end_step`."""
        steps = [*range(self.start_step + self.every, self.end_step, self.every), self.end_step]
        length = self.end_step - self.start_step
        return tuple((step, self._curve((step - self.start_step) / length)) for step in steps)

    def _curve(self, progress: float) -> float:
        return progress


@dataclass(frozen=True)
class CubicSchedule(LinearSchedule):
    """Sparsity rises fast at first and slowly at the end: `1 - (1 - progress)^3` (Zhu & Gupta 2017, eq. 1).

    Example:
        >>> CubicSchedule(0, 100, every=50).stages
        ((50, 0.875), (100, 1.0))
    """

    def _curve(self, progress: float) -> float:
        return 1 - (1 - progress) ** 3
