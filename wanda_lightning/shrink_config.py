"""`ShrinkConfig`, the choices of `shrink`. Importing this file loads neither torch nor a model library."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from wanda_lightning import methods
from wanda_lightning.common.checks import COUNT, Number, check_flags, check_values
from wanda_lightning.common.errors import UserError
from wanda_lightning.config import PruningConfig

if TYPE_CHECKING:
    from wanda_lightning.training import Recovery


class ShrinkChoices(TypedDict, total=False):
    """The type of `**choices`: the arguments of `ShrinkConfig` that do not say how much leaves."""

    by: Literal["equal", "loss", "seconds"]
    refit: bool
    multiple_of: int
    recovery: Recovery | str | None
    sequential: str
    skip: str | Sequence[str]
    only: str | Sequence[str]
    keep_batch_norm: bool


@dataclass(frozen=True, kw_only=True)
class ShrinkConfig:
    """The choices of `shrink`: what leaves a model, how much of it, and how the rest makes up for it.

    Args:
        units: Fraction of the hidden units that leave, above 0 and below 1.
        experts: Fraction of the experts that leave each mixture of experts, rounded to whole experts. An expert is
            scored by the sum over all tokens of the norm of what it adds: its gate times its output.
        max_size: Size of the new model, such as `"60GB"`, in place of `experts`: as many experts stay as fit.
        by: Which layers lose units: all the same fraction (`equal`), or those on whose units the predictions depend
            least (`loss`), relative to the time that a unit takes (`seconds`).
        refit: Compute the remaining weights of layers that read units anew, from the dense layer's outputs.
        multiple_of: The number of units that a layer keeps is rounded to a multiple of this, at least one.
        recovery: How the model is trained after its units have left: not at all (`none`), by block (`reconstruct`),
            or as a whole (`distill`).
        sequential: What leaves before the statistics are collected: the earlier blocks (`block`), all earlier layers
            (`layer`) or nothing (`none`); `auto` means `none` for experts and image models, else `layer`, or `block`
            if a recovery trains blocks.
        skip: Layers to leave as they are: names, globs, or `re:` and a regular expression.
        only: Layers that may change, by default all, named in the same way. `skip` takes precedence.
        keep_batch_norm: Leave the running statistics of BatchNorm layers as they are, instead of correcting them.

    Raises:
        ValueError: If a value is out of range, a name is unknown, or a choice would be ignored.
    """

    units: float | None = None
    experts: float | None = None
    max_size: str | None = None
    by: Literal["equal", "loss", "seconds"] = "equal"
    refit: bool = True
    multiple_of: int = 8
    recovery: Recovery | str | None = None
    sequential: str = "auto"
    skip: str | Sequence[str] = ()
    only: str | Sequence[str] = ()
    keep_batch_norm: bool = False

    def __post_init__(self) -> None:
        fraction = Number(above=0, below=1)
        if self.units is not None:
            check_values(fraction, units=self.units)
        if self.experts is not None:
            check_values(fraction, experts=self.experts)
        check_values(("equal", "loss", "seconds"), by=self.by)
        check_values(COUNT, multiple_of=self.multiple_of)
        check_flags(refit=self.refit)
        if not self.units:
            self._refuse_ignored({"by", "refit", "multiple_of", "recovery"})
        if not (self.units or self.experts or self.max_size):
            self._refuse_ignored({"sequential", "skip", "only", "keep_batch_norm"})
        if self.experts and self.max_size:
            raise UserError(
                f"max_size={self.max_size} chooses how many experts leave. Leave experts out."
            )
        _ = self.parts  # which raises the errors of its choices

    def _refuse_ignored(self, options: Collection[str]) -> None:
        """Refuse choices that nothing reads without `units`."""
        for option in fields(self):
            value = getattr(self, option.name)
            # An empty list is no choice, either.
            is_chosen = value != option.default and (value or option.default)
            if option.name in options and is_chosen:
                raise UserError(
                    f"{option.name}={value!r} would be ignored without units. Give units=0.5, for example, or leave "
                    f"{option.name} out."
                )

    @cached_property
    def parts(self) -> tuple[PruningConfig, ...]:
        """The choices of what leaves, in order; empty if nothing but zero units leaves."""
        from wanda_lightning.core import Experts, Structured

        allocation: Any = methods.ALLOCATIONS["uniform"]()
        if self.by != "equal":
            allocation = methods.BEST.allocation()  # of a few samples
        if self.by == "seconds":
            allocation = replace(allocation, cost="seconds")
        shared: Any = {
            "sequential": self.sequential,
            "skip": self.skip,
            "only": self.only,
            "keep_batch_norm": self.keep_batch_norm,
        }
        parts = []
        if self.units is not None:
            part = PruningConfig(
                self.units,
                pattern=Structured(self.multiple_of),
                allocation=allocation,
                solver="refit" if self.refit else "zero_out",
                recovery=self.recovery,
                **shared,
            )
            parts.append(part)
        if self.experts or self.max_size:
            # The model decides how many experts fit.
            parts.append(PruningConfig(self.experts or 0.5, pattern=Experts(), **shared))
        return tuple(parts)
