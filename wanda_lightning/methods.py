"""The names of all choices, and what each method means. Importing this loads neither torch nor a model library.

A method is a criterion, a solver, an allocation and a recovery under one name. A new method is one line in `METHODS`;
the tables of criteria and solvers follow from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import Any, Literal, get_args

Group = Literal["row", "layer"]
SequentialChoice = Literal["block", "layer", "none"]
SEQUENTIAL_CHOICES: tuple[str, ...] = get_args(SequentialChoice)


@dataclass(frozen=True)
class Choice:
    """A class of this package with the arguments to construct it; its module is imported when it is called."""

    path: str
    arguments: tuple[tuple[str, Any], ...] = ()

    def load(self) -> Any:
        """Import the class."""
        module, name = self.path.rsplit(".", 1)
        return getattr(import_module(f"wanda_lightning.{module}"), name)

    def __call__(self) -> Any:
        """Construct the object."""
        return self.load()(**dict(self.arguments))


def choice(path: str, **arguments: Any) -> Choice:
    """Name a class by its path inside the package, such as `core.criteria.Wanda`."""
    return Choice(path, tuple(arguments.items()))


ZERO_OUT = choice("core.solvers.ZeroOut")
UNIFORM = choice("core.allocation.Uniform")
NO_RECOVERY = choice("recovery.NoRecovery")
RECONSTRUCT = choice("recovery.Reconstruct")
ADMM = choice("core.solvers.ADMM")


@dataclass(frozen=True)
class Method:
    """What a method chooses; the sparsity and the pattern are left to the user.

    Attributes:
        criterion: None is the solver's own.
        solver: Computes the final weights.
        group: What unstructured pruning compares; None is what the criterion and the solver compare in their papers.
        sequential: Whose pruning the statistics see; None is `"block"`.
        allocation: Distributes the sparsity over the layers; not with N:M, where 2:4 in some layers and 1:4 in others
            would not be 2:4.
        recovery: Trains the kept weights.
    """

    criterion: Choice | None = None
    solver: Choice = ZERO_OUT
    group: Group | None = None
    sequential: SequentialChoice | None = None
    allocation: Choice = UNIFORM
    recovery: Choice = NO_RECOVERY


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "wanda": Method(choice("core.criteria.Wanda")),
        "magnitude": Method(choice("core.criteria.Magnitude")),
        "ria": Method(choice("core.criteria.RIA")),
        "sparsegpt": Method(solver=choice("core.solvers.SparseGPT")),
        "ablate_mag_seq": Method(choice("core.criteria.Magnitude"), choice("core.solvers.SparseGPT", mask="upfront")),
        "ablate_wanda_seq": Method(choice("core.criteria.Wanda"), choice("core.solvers.SparseGPT", mask="upfront")),
        "ablate_mag_iter": Method(choice("core.criteria.Magnitude"), choice("core.solvers.SparseGPT")),
        "ablate_wanda_iter": Method(choice("core.criteria.Wanda"), choice("core.solvers.SparseGPT")),
        "refit": Method(solver=choice("core.solvers.Refit")),
        "admm": Method(solver=ADMM),
        "reconstruct": Method(solver=ADMM, sequential="block", recovery=RECONSTRUCT),
    }
)

PRESETS: Mapping[str, Method] = MappingProxyType(
    {
        "fast": Method(choice("core.criteria.Wanda"), sequential="layer"),
        "balanced": Method(solver=choice("core.solvers.ADMM", iterations=6), group="layer", sequential="layer"),
        "best": Method(
            solver=ADMM,
            group="layer",
            sequential="layer",
            allocation=choice("core.allocation.Fisher", num_samples=8),
        ),
    }
)

CRITERIA: Mapping[str, Choice] = MappingProxyType(
    {name: method.criterion for name, method in METHODS.items() if method.criterion and method.solver == ZERO_OUT}
    | {"saliency": choice("core.criteria.Saliency")}
)

SOLVERS: Mapping[str, Choice] = MappingProxyType(
    {"zero_out": ZERO_OUT}
    | {
        name: method.solver
        for name, method in METHODS.items()
        if method.criterion is None and method.recovery == NO_RECOVERY
    }
)

PATTERNS: Mapping[str, Choice] = MappingProxyType(
    {
        "unstructured_row": choice("core.patterns.Unstructured", group="row"),
        "unstructured_layer": choice("core.patterns.Unstructured", group="layer"),
        "equal_share": choice("core.patterns.EqualShare"),
        "2:4": choice("core.patterns.NM", n=2, m=4),
        "4:8": choice("core.patterns.NM", n=4, m=8),
    }
)

ALLOCATIONS: Mapping[str, Choice] = MappingProxyType(
    {
        "uniform": UNIFORM,
        "owl": choice("core.allocation.OWL"),
        "owl_layer": choice("core.allocation.OWL", per="layer"),
        "alpha": choice("core.allocation.AlphaPruning"),
        "alpha_layer": choice("core.allocation.AlphaPruning", per="layer"),
        "fisher": choice("core.allocation.Fisher"),
    }
)

RECOVERIES: Mapping[str, Choice] = MappingProxyType({"none": NO_RECOVERY, "reconstruct": RECONSTRUCT})
