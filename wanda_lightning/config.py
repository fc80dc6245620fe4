"""The choices that make one pruning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from numbers import Real
from typing import Any, TypeVar, cast

from torch import nn

from wanda_lightning.core.allocation import ALLOCATIONS, Allocation, Uniform
from wanda_lightning.core.criteria import CRITERIA, Criterion
from wanda_lightning.core.patterns import Pattern, Unstructured, pattern_named
from wanda_lightning.core.solvers import SOLVERS, Reconstruct, Solver, ZeroOut
from wanda_lightning.models import SEQUENTIAL_CHOICES, Inventory, find_layers

Chosen = TypeVar("Chosen")


@dataclass(frozen=True)
class PruningConfig:
    """The five independent choices, and what to leave out. Names become objects here.

    Attributes:
        sparsity: Fraction of each pruned layer's weights that become zero, in [0, 1).
        criterion: Gives scores: `Magnitude()`, `Wanda()`, or the name of one; by default the solver's own (of
            `ZeroOut()` it is Wanda).
        pattern: Where zeros may fall: `Unstructured()`, `NM(2, 4)`, `EqualShare()`, or a name such as `"2:4"`.
        allocation: Spreads the sparsity over the layers: `Uniform()`, `Fisher()`, `OWL()`, `AlphaPruning()`,
            `PerLayer({...})`, or a name such as `"owl"`.
        solver: Gives the final weights: `ZeroOut()`, or a name.
        sequential: What the statistics see: `"block"` (blocks before are pruned, the block itself is dense),
            `"layer"` (everything before is pruned) or `"model"` (the dense model).
        skip: Layers to leave dense: names, globs, or `re:` expressions.
        only: The layers to prune, likewise, where not all; what `skip` names stays dense.
        include_grouped: Prune grouped convolutions, too: each group as a matrix of its own, by its own inputs.
        min_expert_tokens: An expert to which fewer calibration tokens were routed is pruned with the statistics of all
            experts of its module. A norm over n Gaussian inputs is off by 0.7 / sqrt(n), 12 % at 32.

    Raises:
        ValueError: If a value is out of range or a name is unknown.
    """

    sparsity: float = 0.5
    criterion: Criterion | str | None = None
    pattern: Pattern | str = field(default_factory=Unstructured)
    allocation: Allocation | str = field(default_factory=Uniform)
    solver: Solver | str = field(default_factory=ZeroOut)
    sequential: str = "block"
    skip: Sequence[str] = ()
    only: Sequence[str] = ()
    include_grouped: bool = False
    min_expert_tokens: int = 32

    def __post_init__(self) -> None:
        if not isinstance(self.sparsity, Real) or not 0 <= self.sparsity < 1:
            raise ValueError(
                f"sparsity is the fraction of weights that become zero, in [0, 1), but {self.sparsity} was given"
            )
        if self.sequential not in SEQUENTIAL_CHOICES:
            raise ValueError(f"sequential is one of {', '.join(SEQUENTIAL_CHOICES)}, but {self.sequential!r} was given")
        if not isinstance(self.min_expert_tokens, int) or self.min_expert_tokens < 0:
            raise ValueError(
                f"min_expert_tokens is a number of tokens, 0 or more, but {self.min_expert_tokens!r} was given"
            )
        solver = _checked("solver", Solver, self.solver, _named("solver", SOLVERS))
        criterion = solver.own_criterion if self.criterion is None else self.criterion
        criterion = _checked("criterion", Criterion, criterion, _named("criterion", CRITERIA))
        if not solver.takes_any_criterion and criterion != solver.own_criterion:
            raise ValueError(
                f"{solver} chooses the weights itself, but criterion={criterion} was given: leave the criterion out, "
                "or use another solver"
            )
        if isinstance(solver, Reconstruct) and self.sequential != "block":
            raise ValueError(
                f"Reconstruct trains the parts of blocks, but sequential={self.sequential!r} was given: use "
                "sequential='block', or another solver"
            )
        resolved = {
            "criterion": criterion,
            "pattern": _checked("pattern", Pattern, self.pattern, pattern_named),
            "allocation": _checked("allocation", Allocation, self.allocation, _named("allocation", ALLOCATIONS)),
            "solver": solver,
            "skip": (self.skip,) if isinstance(self.skip, str) else tuple(self.skip),
            "only": (self.only,) if isinstance(self.only, str) else tuple(self.only),
        }
        for name, value in resolved.items():
            object.__setattr__(self, name, value)
        cast(Pattern, self.pattern).check(self.sparsity)

    @property
    def needs(self) -> frozenset[str]:
        """All statistics that are read; empty means no calibration data."""
        return self.unit_needs | cast(Allocation, self.allocation).needs

    @property
    def reads_batches(self) -> bool:
        """Whether calibration batches are read."""
        return self.reader is not None

    @property
    def reader(self) -> object:
        """The choice for which calibration data is asked, for messages."""
        choices = (cast(Criterion, self.criterion), cast(Solver, self.solver), cast(Allocation, self.allocation))
        return next((choice for choice in choices if choice.needs or getattr(choice, "reads_gradients", False)), None)

    @property
    def unit_needs(self) -> frozenset[str]:
        """Those that criterion and solver read, at each unit; the allocation reads its own before, of all layers."""
        return cast(Criterion, self.criterion).needs | cast(Solver, self.solver).needs

    def find_layers(self, model: nn.Module, sequential: str | None = None) -> Inventory:
        """What would be pruned and what not; by default in the units of this sequential."""
        pattern = cast(Pattern, self.pattern)
        return find_layers(model, sequential or self.sequential, self.skip, self.only, self.include_grouped, pattern)

    def describe(self) -> dict[str, Any]:
        """Every value as plain data, for the report."""
        return {name: _describe(value) for name, value in vars(self).items()}


def _named(axis: str, table: Mapping[str, Callable[[], Chosen]]) -> Callable[[str], Chosen]:
    def find(name: str) -> Chosen:
        if name not in table:
            raise ValueError(f"no {axis} is called {name!r}: use one of {', '.join(table)}")
        return table[name]()

    return find


def _checked(axis: str, base: type[Any], choice: Any, find: Callable[[str], Any]) -> Any:
    if isinstance(choice, str):
        return find(choice)
    if not isinstance(choice, base):
        raise ValueError(f"{axis} is an object such as those in wanda_lightning, or a name, but {choice!r} was given")
    return choice


def _describe(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        values = {each.name: _describe(getattr(value, each.name)) for each in fields(value)}
        return {"name": type(value).__name__, **values}
    return list(value) if isinstance(value, tuple) else value
