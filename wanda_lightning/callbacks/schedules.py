"""Schedules, with the optimizer steps at which to prune and the sparsity at each, and how far a model is pruned."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from wanda_lightning.common.aliases import Kwargs
from wanda_lightning.common.checks import check_at_least
from wanda_lightning.common.errors import UserError
from wanda_lightning.report import PruningReport

Stages = tuple[tuple[int, float], ...]


class Schedule(ABC):
    """The optimizer steps at which to prune, each with a share of the final sparsity.

    A stage `(step, share)` prunes to `share * sparsity` after `step` optimizer steps; if layers have different
    sparsities, to that share of each. Steps increase, shares never decrease, and the last share is 1.
    """

    @property
    @abstractmethod
    def stages(self) -> Stages:
        """All stages, in order."""

    def share(self, step: int) -> float | None:
        """Return the share of the final sparsity after this many optimizer steps; None before the first stage."""
        return next((share for stage, share in reversed(self.stages) if stage <= step), None)

    def check(self) -> None:
        """Raise a ValueError if steps or shares are out of range or out of order, or the last share is not 1."""
        steps = [step for step, _ in self.stages]
        shares = [share for _, share in self.stages]
        in_order = steps == sorted(set(steps)) and shares == sorted(shares) and shares[-1:] == [1]
        in_range = all(
            isinstance(step, int) and step >= 0 and share > 0 for step, share in self.stages
        )
        if not in_order or not in_range:
            raise UserError(
                "schedule must have stages at increasing optimizer steps of at least 0, with shares of the final "
                f"sparsity that are above 0, never decrease, and end at 1, but {self} has {self.stages}."
            )


@dataclass(frozen=True)
class OneShot(Schedule):
    """Prune to the final sparsity at once.

    Attributes:
        step: Number of optimizer steps before pruning.
    """

    step: int = 0

    @property
    def stages(self) -> Stages:
        """One stage, at `step`."""
        return ((self.step, 1.0),)


@dataclass(frozen=True)
class LinearSchedule(Schedule):
    """Increase the sparsity by the same amount at each stage.

    Attributes:
        start_step: Optimizer step at which the sparsity is still 0.
        end_step: Optimizer step at which it is final.
        every: Optimizer steps between two stages.
    """

    start_step: int
    end_step: int
    every: int

    def __post_init__(self) -> None:
        check_at_least(0, start_step=self.start_step)
        check_at_least(1, every=self.every)
        check_at_least(self.start_step + 1, end_step=self.end_step)

    @property
    def stages(self) -> Stages:
        """One stage every `every` steps after `start_step`, and one at `end_step`."""
        steps = [*range(self.start_step + self.every, self.end_step, self.every), self.end_step]
        length = self.end_step - self.start_step
        return tuple((step, self._curve((step - self.start_step) / length)) for step in steps)

    def _curve(self, progress: float) -> float:
        return progress


@dataclass(frozen=True)
class CubicSchedule(LinearSchedule):
    """Increase the sparsity fast at first and slowly at the end: `1 - (1 - progress)^3` (Zhu & Gupta 2017, eq. 1).

    Example:
        >>> CubicSchedule(0, 100, every=50).stages
        ((50, 0.875), (100, 1.0))
    """

    def _curve(self, progress: float) -> float:
        return 1 - (1 - progress) ** 3


def schedule_of(at_step: int, schedule: Schedule | None) -> Schedule:
    """Return the schedule for two options of a callback; raise a ValueError if both are given, or one is not valid."""
    check_at_least(0, at_step=at_step)
    if schedule is None:
        return OneShot(at_step)
    if at_step:
        raise UserError(
            f"schedule and at_step exclude each other, but at_step={at_step} and schedule={schedule}."
        )
    schedule.check()
    return schedule


@dataclass
class PruningState:
    """The progress of a callback. It does not store which weights are zero, since the weights show it.

    Attributes:
        choices: The choices that a resumed run must not change.
        zeros: The number of zeros of each pruned layer.
        share: The share of the final sparsity that is reached.
        last_asked_step: The optimizer step of the latest call of `should_prune`.
        awaits_validation: Whether to prune at the end of the next validation loop.
        unheld_zeros: The weights that are zero by chance; see `HeldZeros.state_dict`.
        report: The report of the latest pruning.
    """

    choices: Kwargs
    zeros: dict[str, int] = field(default_factory=dict)
    share: float = 0.0
    last_asked_step: int | None = None
    awaits_validation: bool = False
    unheld_zeros: dict[str, Tensor] = field(default_factory=dict)
    report: PruningReport | None = None

    def record(self, report: PruningReport, share: float) -> None:
        """Record that the model was pruned to a share of the final sparsity."""
        # Layers that this stage did not prune keep their counts.
        for layer in report.layers:
            # A layer of zeros only was initialized so, and may train.
            if 0 < layer.sparsity < 1:
                self.zeros[layer.name] = layer.zeros
        self.report = report
        self.share = share
        self.awaits_validation = False

    def describes(self, zeros: Mapping[str, int]) -> bool:
        """Whether a model with layers of these zeros can be the pruned one.

        Each layer then has half of the recorded zeros or more.
        """
        return all(2 * zeros.get(name, 0) >= count for name, count in self.zeros.items())

    def to_checkpoint(self) -> Kwargs:
        """Return plain data and tensors, which `torch.load(weights_only=True)` can read without this package."""
        saved = dict(vars(self))
        if self.report:
            saved["report"] = self.report.to_json()
        return saved

    @classmethod
    def from_checkpoint(cls, saved: Kwargs, choices: Kwargs, name: str) -> PruningState:
        """Restore the state that `to_checkpoint` returned, for a callback of the class `name` with the same choices.

        Training resumes without the report if it cannot be read.
        """
        if saved.get("choices") != choices:
            raise UserError(
                f"{' and '.join(choices)} must be the same as in the checkpoint, which {name} wrote with "
                f"{saved.get('choices')}, but they are {choices}. Use the same, or load only the weights in a new run."
            )

        state = cls({})
        vars(state).update(saved)

        state.report = None
        if saved.get("report"):
            try:
                state.report = PruningReport.from_json(saved["report"])
            except ValueError as error:
                rank_zero_warn(
                    f"The report that {name} saved in the checkpoint cannot be read, so it has none: {error}"
                )
        return state
