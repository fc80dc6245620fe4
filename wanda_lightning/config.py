"""`PruningConfig`, the choices of one pruning. Importing this file loads neither torch nor a model library."""

from __future__ import annotations

import inspect
import re
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, Optional, TypedDict

from wanda_lightning import methods
from wanda_lightning.common.checks import Number, check_flags, check_values
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.layer_names import check_patterns
from wanda_lightning.common.wording import did_you_mean

if TYPE_CHECKING:
    from typing import Unpack as Unpack

    from wanda_lightning.core.allocation import Allocation
    from wanda_lightning.core.criteria import Criterion
    from wanda_lightning.core.patterns import Pattern
    from wanda_lightning.core.solvers import Solver
    from wanda_lightning.training import Recovery
else:
    Unpack = Optional  # jsonargparse would take no defaults and no help from `PruningConfig`

_Contradictions = Iterator[tuple[str, str, str]]  # an option, another one, and why not both


class PruningChoices(TypedDict, total=False):
    """The type of `**choices`: all arguments of `PruningConfig` except the sparsity."""

    method: str | None
    criterion: Criterion | str | None
    solver: Solver | str | None
    pattern: Pattern | str
    allocation: Allocation | str | None
    recovery: Recovery | str | None
    sequential: str | None
    skip: str | Sequence[str]
    only: str | Sequence[str]
    keep_batch_norm: bool


@dataclass(frozen=True, init=False)
class PruningConfig:
    """The choices of one pruning: names become objects, and defaults are filled in.

        >>> PruningConfig(0.5, method="sparsegpt").solver
        SparseGPT(dampening=0.01, block_size=128, mask='block')

    An object such as `NM(1, 4)` can replace a name. The commands derive options and help from this class.

    Args:
        sparsity: Fraction of the pruned layers' weights that become zero, in [0, 1). The number of zeros in a row,
            or in another group that is compared, is rounded down.
        method: Name of a method (by default `wanda`) or of a preset: `fast` (Wanda in one pass), `balanced` (masks and
            weights together, by ADMM), `best`, or `thorough` (`best`, then distillation); it sets the defaults of the
            other choices.
        criterion: How weights are scored, by default as in the paper of the method or the solver.
        pattern: Where zeros may fall: anywhere (`unstructured`), or in N:M such as `2:4`, which keeps N of every M
            weights. `"unstructured"` compares as in the method's paper, `"unstructured_row"` and
            `"unstructured_layer"` compare as they say; `"equal_share"` is the paper's variant. Whole hidden units and
            experts leave a model by `shrink`.
        allocation: How the sparsity is distributed over layers: equally (`uniform`), or less where scores have more
            outliers (`owl`) or the predictions depend more (`fisher`).
        solver: How the final weights are computed: by zeroing alone (`zero_out`), or by updating the rest too.
        recovery: How kept weights are trained: not at all (`none`), by block (`reconstruct`), or all (`distill`).
        sequential: What is pruned before the statistics are collected: the earlier blocks (`block`), all earlier
            layers (`layer`) or nothing (`none`); `auto` means none for image models, else block; `one_pass`
            means none for image models, else layer, or block if a recovery trains blocks.
        skip: Layers to leave dense: names, globs, or `re:` and a regular expression.
        only: Layers to prune, by default all, named in the same way. `skip` takes precedence.
        keep_batch_norm: Leave the running statistics of BatchNorm layers as they are, instead of correcting them.

    Raises:
        ValueError: If a value is out of range, a name is unknown, or two choices contradict each other.
    """

    sparsity: float
    criterion: Criterion
    pattern: Pattern
    allocation: Allocation
    solver: Solver
    recovery: Recovery
    sequential: str
    skip: tuple[str, ...]
    only: tuple[str, ...]
    keep_batch_norm: bool

    def __init__(
        self,
        sparsity: float = 0.5,
        *,
        method: str | None = None,
        criterion: Criterion | str | None = None,
        pattern: Pattern | str = "unstructured",
        allocation: Allocation | str | None = None,
        solver: Solver | str | None = None,
        recovery: Recovery | str | None = None,
        sequential: str | None = None,
        skip: str | Sequence[str] = (),
        only: str | Sequence[str] = (),
        keep_batch_norm: bool = False,
    ) -> None:
        _check_sparsity(sparsity)  # first: the following lines import torch
        check_pattern(pattern)
        base: methods.Method = methods.Method() if method is None else _named("method", method)

        chosen_solver: Solver = _resolve("solver", solver, base.solver)
        # A solver that is given scores as in its own paper, whatever the method is.
        usual_criterion = base.criterion if solver is None else None
        if usual_criterion is None:
            usual_criterion = lambda: chosen_solver.own_criterion  # noqa: E731
        chosen_criterion: Criterion = _resolve("criterion", criterion, usual_criterion)
        chosen_pattern = resolve_pattern(
            pattern, base.group or chosen_solver.group(chosen_criterion)
        )

        # Methods choose these for the patterns that leave something to choose.
        has_fixed_sparsity = chosen_pattern.fixed_sparsity is not None
        usual_allocation = methods.ALLOCATIONS["uniform"] if has_fixed_sparsity else base.allocation
        self.__dict__.update(
            sparsity=sparsity,
            criterion=chosen_criterion,
            pattern=chosen_pattern,
            allocation=_resolve("allocation", allocation, usual_allocation),
            solver=chosen_solver,
            recovery=_resolve("recovery", recovery, base.recovery),
            sequential=base.sequential if sequential is None else sequential,
            skip=check_patterns("skip", skip),
            only=check_patterns("only", only),
            keep_batch_norm=keep_batch_norm,
        )
        self._check()

    def _check(self) -> None:
        _named("sequential", self.sequential)
        check_flags(keep_batch_norm=self.keep_batch_norm)
        self.pattern.check(self.sparsity)
        # The first is enough: its advice may resolve the others.
        for option, other, reason in self._contradictions():
            raise UserError(
                f"{self.shown(option)} cannot be combined with {self.shown(other)}, because {reason}"
            )

    def _contradictions(self) -> _Contradictions:
        """Yield two options that contradict each other, and why, with what to do."""
        if not self.solver.takes_any_criterion and self.criterion != self.solver.own_criterion:
            yield (
                "criterion",
                "solver",
                "the solver scores the weights itself. Leave criterion out.",
            )
        if self.criterion.spans_columns and self.solver.chooses_in_blocks:
            reason = "the one compares whole rows, and the other chooses in one block of columns after another."
            advice = "Use SparseGPT(mask='upfront'), or another criterion or solver."
            yield "criterion", "solver", f"{reason} {advice}"

        if self.pattern.removes == "weights" and self.allocation.cost != "units":
            reason = "only hidden units have a cost. Use shrink(model, batches, units=0.5, by='seconds')."
            yield "allocation", "pattern", reason

        why_not_trained = self.recovery.why_not(self.sequential)
        if why_not_trained:
            yield "recovery", "sequential", why_not_trained

    def shown(self, option: str) -> str:
        """Return an option and its value for messages, as the user can type it: `solver='admm'`, `solver=ADMM(...)`.

        The options of `shrink` have other names.
        """
        value = getattr(self, option)
        removes = self.pattern.removes
        if removes != "weights" and option in ("pattern", "sparsity"):
            return f"{removes}={self.sparsity:g}"
        if removes != "weights" and option == "allocation":
            by = "seconds" if value.cost == "seconds" else "loss"
            return f"by={by!r}" if value.reads_gradients else "by='equal'"
        if isinstance(value, str):
            return f"{option}={value!r}"
        for name, make in NAMES[option].items():
            if make() == value:
                return f"{option}={name!r}"
        return f"{option}={value}"

    @property
    def preset(self) -> str:
        """Name of the preset with exactly these choices; empty if there is none."""
        if self.pattern.removes != "weights":
            return ""
        # Presets choose the groups of `unstructured` themselves; other patterns are the user's.
        pattern = "unstructured" if self.pattern.fixed_sparsity is None else self.pattern
        choices = [option for option in NAMES if option != "method"]
        for name in methods.PRESETS:
            preset = PruningConfig(self.sparsity, method=name, pattern=pattern)
            if all(getattr(preset, option) == getattr(self, option) for option in choices):
                return name
        return ""

    @property
    def stop_needs(self) -> frozenset[str]:
        """The statistics that are collected at each stop, before it is pruned."""
        return self.criterion.needs | self.solver.needs | self.recovery.needs

    @property
    def needs(self) -> frozenset[str]:
        """All statistics that any choice reads, including those of the dense model for the allocation."""
        return self.stop_needs | self.allocation.needs

    @property
    def reads_gradients(self) -> bool:
        """Whether a backward pass of the dense model is needed, for the allocation or the pattern."""
        return self.allocation.reads_gradients or self.pattern.weigh_rows is not False

    @property
    def data_reader(self) -> str | None:
        """The first choice that needs calibration data, as `shown`; None if no choice needs any."""
        choices = ("criterion", "solver", "allocation", "recovery")
        readers = [option for option in choices if _reads_data(getattr(self, option))]
        if self.pattern.removes != "weights":
            readers.insert(0, "pattern")
        elif self.pattern.reads_batches:
            readers.append("pattern")
        return self.shown(readers[0]) if readers else None

    def scaled(self, fraction: float) -> PruningConfig:
        """Return the configuration for a stage of a schedule that gives this fraction of the final sparsities."""
        return replace(
            self, sparsity=self.sparsity * fraction, allocation=self.allocation.scaled(fraction)
        )

    def describe(self) -> dict[str, Any]:
        """Return all choices as plain data."""
        return {field.name: _describe(getattr(self, field.name)) for field in fields(self)}


# jsonargparse takes a method named `__init__` of a dataclass for a generated one, whose arguments are the fields. These
# are objects: YAML files could then give no names.
PruningConfig.__init__.__name__ = "from_choices"


def _reads_data(choice: Any) -> bool:
    kinds_of_data = ("needs", "reads_gradients", "reads_batches")
    return any(getattr(choice, kind, False) for kind in kinds_of_data)


NAMES: Mapping[str, Mapping[str, Any]] = {
    "method": ChainMap(methods.PRESETS, methods.METHODS),
    "criterion": methods.CRITERIA,
    "pattern": ChainMap({"unstructured": methods.PATTERNS["unstructured_row"]}, methods.PATTERNS),
    "allocation": methods.ALLOCATIONS,
    "solver": methods.SOLVERS,
    "recovery": methods.RECOVERIES,
    "sequential": dict.fromkeys((*methods.SEQUENTIAL_CHOICES, "auto", "one_pass")),
}
"""The names that an argument of `PruningConfig` takes; `pattern` also takes any N:M."""


def _base(option: str) -> type:
    """Return the class of the objects that an option takes."""
    from wanda_lightning import training
    from wanda_lightning.core import allocation, criteria, patterns, solvers

    rooms = (allocation, criteria, patterns, solvers, training)
    return next(getattr(room, option.title()) for room in rooms if hasattr(room, option.title()))


def config_of(
    sparsity: float | PruningConfig, function: Callable[..., Any], /, **choices: Any
) -> PruningConfig:
    """Return the choices of a function; refuse one that is no choice of pruning, or that came with a whole config."""
    known = PruningChoices.__annotations__
    for name in choices.keys() - known.keys():
        near = did_you_mean(name, [*known, *inspect.signature(function).parameters])
        if name == "report":
            near = " Call report.save(PATH) on the report that prune returns, or callback.report.save(PATH)."
        raise UserError(f"{name} is no choice of pruning.{near}")
    # A YAML file gives every choice its default.
    arguments = inspect.signature(PruningConfig).parameters
    given = [name for name, value in choices.items() if value != arguments[name].default]
    if not isinstance(sparsity, PruningConfig):
        sparsity = PruningConfig(sparsity, **choices)
    elif given:
        raise UserError(
            f"A PruningConfig holds all choices, but {', '.join(given)} came with one. Give the config alone, or make "
            "another PruningConfig."
        )
    _refuse_what_shrinks(sparsity.pattern)
    return sparsity


def _check_sparsity(sparsity: float) -> None:
    name = "sparsity"
    if isinstance(sparsity, int | float) and sparsity > 1:
        name = f"sparsity ({sparsity / 100:g} for {sparsity:g} %)"
    shown = {name: sparsity}
    check_values(Number(minimum=0, below=1), **shown)


def _named(option: str, name: object) -> Any:
    names = NAMES[option]
    if not isinstance(name, str) or name not in names:
        near = did_you_mean(str(name), names)
        raise UserError(f"{option} must be one of {', '.join(names)}, but it is {name!r}.{near}")
    return names[name]


def _resolve(option: str, given: Any, default: Callable[[], Any] = dict) -> Any:
    """Return the object for an option, which is given as an object, as a name, or not at all."""
    if given is None:
        return default()
    if isinstance(given, str):
        return _named(option, given)()
    if not isinstance(given, (base := _base(option))):
        names = ", ".join(NAMES[option])
        hint = f" Give an object: {given.__name__}(...)." if isinstance(given, type) else ""
        raise UserError(
            f"{option} must be of class {base.__name__} or one of {names}, but it is {given!r}.{hint}"
        )
    if not is_dataclass(given):
        raise UserError(
            f"{option} must be a dataclass, whose fields the report shows and a resumed run compares, but "
            f"{type(given).__name__} is none. Write @dataclass(frozen=True) above the class."
        )
    return given


def resolve_pattern(given: Pattern | str, group: str = "row") -> Pattern:
    """Resolve the name of a pattern; `"unstructured"` compares the weights within the given group.

    Example:
        >>> resolve_pattern("1:4")
        NM(n=1, m=4)
    """
    check_pattern(given)
    if given == "unstructured":
        given = f"unstructured_{group}"
    if isinstance(given, str) and ":" in given:
        from wanda_lightning.core.patterns import NM

        n, _, m = given.partition(":")
        return NM(int(n), int(m))
    return _resolve("pattern", given)


def check_pattern(given: object) -> None:
    """Raise a ValueError for a name that is not one of a pattern, nor N:M."""
    if isinstance(given, str | None):
        _refuse_what_shrinks(given)
        if not re.fullmatch(r"\d+:\d+", given or ""):
            _named("pattern", given)


def _refuse_what_shrinks(pattern: object) -> None:
    """Refuse patterns of which no zeros stay, with the call that replaces them."""
    removes = getattr(pattern, "removes", str(pattern).partition(":")[0].partition("_")[0])
    amount = {"units": "units", "structured": "units", "experts": "experts"}.get(removes)
    if amount:
        raise UserError(
            f"pattern={pattern!r} leaves no zeros, but a smaller model. Use shrink(model, batches, {amount}=0.5), "
            f"`wanda-lightning shrink --{amount} 0.5` or ShrinkCallback({amount}=0.5)."
        )


def _describe(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    if not is_dataclass(value):
        return value
    described: dict[str, Any] = {"name": type(value).__name__}
    for option in fields(value):
        described[option.name] = _describe(getattr(value, option.name))
    return described
