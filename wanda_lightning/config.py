"""The choices that make one pruning: `PruningConfig`. Importing this loads neither torch nor a model library."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

from wanda_lightning.core.name_patterns import check_patterns, did_you_mean
from wanda_lightning.methods import (
    ALLOCATIONS,
    CRITERIA,
    METHODS,
    PATTERNS,
    PRESETS,
    RECOVERIES,
    SEQUENTIAL_CHOICES,
    SOLVERS,
    UNIFORM,
    Choice,
    Method,
    choice,
)

if TYPE_CHECKING:
    from wanda_lightning.core.allocation import Allocation
    from wanda_lightning.core.criteria import Criterion
    from wanda_lightning.core.patterns import Pattern
    from wanda_lightning.core.solvers import Solver
    from wanda_lightning.recovery import Recovery


@dataclass(frozen=True)
class PruningConfig:
    """The independent choices, and what to leave out, every field of one type; `from_names` constructs it.

    The attributes are described by the arguments of `from_names`.

    Raises:
        ValueError: If a value is out of range, or two choices contradict each other.
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
    include_grouped: bool
    min_expert_tokens: int

    @classmethod
    def from_names(
        cls,
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
        include_grouped: bool = False,
        min_expert_tokens: int = 32,
    ) -> PruningConfig:
        """Turn names into objects, and fill in what is not given. This is the only place that does.

        Args:
            sparsity: Fraction of the pruned layers' weights that become zero, in [0, 1).
            method: Name of a method or preset, which chooses what the following arguments leave open.
            criterion: Scores the weights: `Wanda()`, `Magnitude()`, `RIA()`, or a name; by default the solver's own.
            pattern: Where zeros may fall: `"unstructured"` compares what the method compares in its paper (rows for
                Wanda, the whole layer for magnitude and SparseGPT); or `Unstructured("row")`, `NM(2, 4)`,
                `EqualShare()`, or a name such as `"2:4"`.
            allocation: Distributes the sparsity over the layers: `Uniform()`, `Fisher()`, `OWL()`, `AlphaPruning()`,
                `PerLayer({...})`, or a name such as `"owl"`.
            solver: Computes the final weights: `ZeroOut()`, `SparseGPT()`, `Refit()`, `ADMM()`, or a name.
            recovery: Trains the kept weights afterwards: `NoRecovery()`, `Reconstruct()`, or a name.
            sequential: Whose pruning the statistics see: `"block"` (earlier blocks are pruned, the block itself is
                dense), `"layer"` (everything before the layer is pruned) or `"none"` (the whole model is dense).
            skip: Layers to leave dense: names, globs, or `re:` and a regular expression.
            only: The layers to prune, named likewise; by default all. Layers that `skip` names stay dense.
            include_grouped: Prune grouped convolutions, too: each group as a matrix of its own, by its own inputs.
            min_expert_tokens: An expert to which fewer calibration tokens were routed is pruned with the statistics of
                all experts of its module. A norm over n Gaussian inputs is off by 0.7 / sqrt(n), 12 % at 32.

        Raises:
            ValueError: If a value is out of range, a name is unknown, or two choices contradict each other.
        """
        base = Method() if method is None else _method(method)
        chosen_solver: Solver = _resolve("solver", SOLVERS, solver, base.solver)
        if criterion is None and (solver is not None or base.criterion is None):
            criterion = chosen_solver.own_criterion
        chosen_criterion: Criterion = _resolve("criterion", CRITERIA, criterion, base.criterion)
        chosen_pattern = resolve_pattern(pattern, base.group or chosen_solver.group(chosen_criterion))
        usual_allocation = base.allocation if chosen_pattern.fixed_sparsity is None else UNIFORM
        return cls(
            sparsity=sparsity,
            criterion=chosen_criterion,
            pattern=chosen_pattern,
            allocation=_resolve("allocation", ALLOCATIONS, allocation, usual_allocation),
            solver=chosen_solver,
            recovery=_resolve("recovery", RECOVERIES, recovery, base.recovery),
            sequential=base.sequential or "block" if sequential is None else sequential,
            skip=check_patterns("skip", skip),
            only=check_patterns("only", only),
            include_grouped=include_grouped,
            min_expert_tokens=min_expert_tokens,
        )

    def __post_init__(self) -> None:
        if not isinstance(self.sparsity, Real) or isinstance(self.sparsity, bool) or not 0 <= self.sparsity < 1:
            raise ValueError(
                "sparsity must be the fraction of weights that become zero, at least 0 and below 1, but it is "
                f"{self.sparsity!r}."
            )
        if self.sequential not in SEQUENTIAL_CHOICES:
            raise ValueError(_not_one_of("sequential", self.sequential, SEQUENTIAL_CHOICES))
        if not isinstance(self.min_expert_tokens, int) or self.min_expert_tokens < 0:
            raise ValueError(
                f"min_expert_tokens must be a number of tokens, 0 or more, but it is {self.min_expert_tokens!r}."
            )
        if not self.solver.takes_any_criterion and self.criterion != self.solver.own_criterion:
            raise ValueError(
                f"criterion={self.criterion} cannot be combined with solver={self.solver}, which scores the weights "
                "itself. Leave the criterion out, or use another solver."
            )
        self.pattern.check(self.sparsity)
        self.recovery.check(self.sequential)

    @property
    def unit_needs(self) -> frozenset[str]:
        """The statistics that are collected at each unit, before it is pruned."""
        return self.criterion.needs | self.solver.needs | self.recovery.needs

    @property
    def needs(self) -> frozenset[str]:
        """All statistics that are read, those of the allocation included, which are of the dense model."""
        return self.unit_needs | self.allocation.needs

    @property
    def data_reader(self) -> object | None:
        """The choice for which calibration data are needed, for messages; None if no choice needs any."""
        choices = (self.criterion, self.solver, self.allocation, self.recovery)
        return next((one for one in choices if one.needs or getattr(one, "reads_gradients", False)), None)

    def describe(self) -> dict[str, Any]:
        """Every value as plain data, for the report."""
        return {field.name: _describe(getattr(self, field.name)) for field in fields(self)}


def _method(name: str) -> Method:
    methods = {**METHODS, **PRESETS}
    if name not in methods:
        raise ValueError(_not_one_of("method", name, methods))
    return methods[name]


def _resolve(option: str, table: Mapping[str, Choice], given: Any, default: Choice | None) -> Any:
    """The object for an option: the one given, the one that a name stands for, or the default."""
    if given is None:
        assert default is not None
        return default()
    if isinstance(given, str):
        if given not in table:
            raise ValueError(_not_one_of(option, given, table))
        return table[given]()
    if not isinstance(given, (base := _base_class(option))):
        raise ValueError(
            f"{option} must be of class {base.__name__} or one of {', '.join(table)}, but it is {given!r}."
        )
    return given


def resolve_pattern(given: Pattern | str, group: str = "row") -> Pattern:
    """The pattern that a name stands for; `"unstructured"` compares within the given group.

    Example:
        >>> resolve_pattern("1:4")
        NM(n=1, m=4)

    Raises:
        ValueError: If there is none of that name.
    """
    if given == "unstructured":
        given = f"unstructured_{group}"
    if isinstance(given, str) and (match := re.fullmatch(r"(\d+):(\d+)", given)):
        return choice("core.patterns.NM", n=int(match[1]), m=int(match[2]))()
    names = dict.fromkeys(["unstructured", *PATTERNS, "N:M"])
    if given is None or (isinstance(given, str) and given not in PATTERNS):
        raise ValueError(_not_one_of("pattern", given, names))
    return _resolve("pattern", PATTERNS, given, None)


def _base_class(option: str) -> type[Any]:
    paths = {
        "criterion": "core.criteria.Criterion",
        "pattern": "core.patterns.Pattern",
        "allocation": "core.allocation.Allocation",
        "solver": "core.solvers.Solver",
        "recovery": "recovery.Recovery",
    }
    return choice(paths[option]).load()


def _not_one_of(option: str, given: object, names: Iterable[str]) -> str:
    known = list(names)
    return f"{option} must be one of {', '.join(known)}, but it is {given!r}.{did_you_mean(str(given), known)}"


def _describe(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        values = {each.name: _describe(getattr(value, each.name)) for each in fields(value)}
        return {"name": type(value).__name__, **values}
    return list(value) if isinstance(value, tuple) else value
