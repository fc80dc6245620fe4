"""The tables of all names that users can choose. Importing this file loads neither torch nor a model library.

A method is a criterion, a solver, an allocation and a recovery under one name. A new method is one line in `METHODS`;
the tables of criteria and solvers follow from it. Entries are functions, because the classes import torch. `register`
adds names from outside of the package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from wanda_lightning.common.errors import UserError

if TYPE_CHECKING:
    from wanda_lightning.core.allocation import Allocation
    from wanda_lightning.core.criteria import Criterion
    from wanda_lightning.core.patterns import Pattern
    from wanda_lightning.core.solvers import Solver
    from wanda_lightning.training import Recovery

SEQUENTIAL_CHOICES = ("block", "layer", "none")

_Choice = TypeVar("_Choice")
Table = dict[str, Callable[[], _Choice]]  # by name


def _make(room: str, name: str, **settings: Any) -> Any:
    return getattr(import_module(f"wanda_lightning.{room}"), name)(**settings)


def _core(name: str, **settings: Any) -> Callable[[], Any]:
    """Return a function that makes an object of a class in `wanda_lightning.core`."""
    return partial(_make, "core", name, **settings)


def _training(name: str) -> Callable[[], Any]:
    return partial(_make, "training", name)


PATTERNS: Table[Pattern] = {
    "unstructured_row": _core("Unstructured", group="row"),
    "unstructured_layer": _core("Unstructured", group="layer"),
    "unstructured_layer_weighted": _core("Unstructured", group="layer", weigh_rows=None),
    "equal_share": _core("EqualShare"),
    "2:4": _core("NM", n=2, m=4),
    "4:8": _core("NM", n=4, m=8),
}

ALLOCATIONS: Table[Allocation] = {
    "uniform": _core("Uniform"),
    "owl": _core("OWL"),
    "fisher": _core("Fisher"),
}

RECOVERIES: Table[Recovery] = {
    "none": _training("NoRecovery"),
    "reconstruct": _training("Reconstruct"),
    "distill": _training("Distill"),
}


_zero_out = _core("ZeroOut")


@dataclass(frozen=True)
class Method:
    """The choices of a method. It does not choose the sparsity and the pattern."""

    criterion: Callable[[], Criterion] | None = None  # None for the solver's own
    solver: Callable[[], Solver] = _zero_out
    # Where unstructured pruning compares weights; None for the choice in the papers of the criterion and the solver.
    group: Literal["row", "layer", "layer_weighted"] | None = None
    sequential: str = "auto"  # the recovery or the model decides
    # N:M always gets "uniform" instead, because the others would mix 2:4 with 1:4 layers.
    allocation: Callable[[], Allocation] = ALLOCATIONS["uniform"]
    recovery: Callable[[], Recovery] = RECOVERIES["none"]


METHODS: dict[str, Method] = {
    "wanda": Method(_core("Wanda")),
    "magnitude": Method(_core("Magnitude")),
    "ria": Method(_core("RIA")),
    "sparsegpt": Method(solver=_core("SparseGPT")),
    "ablate_mag_seq": Method(_core("Magnitude"), _core("SparseGPT", mask="upfront")),
    "ablate_wanda_seq": Method(_core("Wanda"), _core("SparseGPT", mask="upfront")),
    "ablate_mag_iter": Method(_core("Magnitude"), _core("SparseGPT")),
    "ablate_wanda_iter": Method(_core("Wanda"), _core("SparseGPT")),
    "refit": Method(solver=_core("Refit")),
    "admm": Method(solver=_core("ADMM")),
}

BEST = Method(
    solver=_core("ADMM"),
    group="layer_weighted",
    sequential="one_pass",
    # 8 windows of at least 512 tokens each, or 4096 images. The gradients of 8 images would be far too noisy.
    allocation=_core("Fisher", num_samples=8, num_predictions=4096),
)

PRESETS: dict[str, Method] = {
    "fast": Method(_core("Wanda"), sequential="one_pass"),
    "balanced": Method(solver=_core("ADMM", iterations=6), group="layer", sequential="one_pass"),
    "best": BEST,
    "thorough": replace(BEST, recovery=RECOVERIES["distill"]),
}

CRITERIA: Table[Criterion] = {
    name: method.criterion
    for name, method in METHODS.items()
    if method.criterion and method.solver is _zero_out
} | {"saliency": _core("Saliency")}

SOLVERS: Table[Solver] = {"zero_out": _zero_out} | {
    name: method.solver
    for name, method in METHODS.items()
    if method.criterion is None and method.recovery is RECOVERIES["none"]
}

_TABLES: dict[str, Table[Any]] = {
    "Criterion": CRITERIA,
    "Solver": SOLVERS,
    "Pattern": PATTERNS,
    "Allocation": ALLOCATIONS,
    "Recovery": RECOVERIES,
}


def register(name: str) -> Callable[[type[_Choice]], type[_Choice]]:
    """Give a class of your own a name, which every argument for such a class then takes.

    The class is a frozen dataclass, and a criterion, solver, pattern, allocation or recovery whose hyperparameters have
    defaults. A criterion or a solver is then a method, too: `@register("power")` makes `method="power"` work.

    Raises:
        ValueError: If the package has that name itself, or the class is none of these. A name of your own can be given
            again, as when a cell of a notebook runs twice.
    """

    def add(cls: type[_Choice]) -> type[_Choice]:
        base = next((base.__name__ for base in cls.__mro__ if base.__name__ in _TABLES), "")
        if not base:
            raise UserError(
                f"register({name!r}) takes a subclass of {', '.join(_TABLES)}, but {cls.__name__} is none."
            )
        own_names = {"unstructured", *METHODS, *PRESETS, *_TABLES[base]}
        if ":" in name or (name in own_names and (base, name) not in _registered):
            raise UserError(f"{name!r} is a name of this package. Give {cls.__name__} another one.")
        _registered.add((base, name))
        _TABLES[base][name] = cls
        if base == "Criterion":
            METHODS[name] = Method(cls)  # type: ignore[arg-type]
        elif base == "Solver":
            METHODS[name] = Method(solver=cls)  # type: ignore[arg-type]
        return cls

    return add


_registered: set[tuple[str, str]] = set()
