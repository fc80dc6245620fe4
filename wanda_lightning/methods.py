"""The tables of all names that users can choose. Importing this file loads neither torch nor a model library.

A method is a criterion, a solver, an allocation and a recovery under one name. A new method is one line in `METHODS`;
the tables of criteria and solvers follow from it. Each choice is a function, because `wl.Wanda` imports torch: the root
of the package imports a public class on first use. For a class that is not public, write a function that imports it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeVar

import wanda_lightning as wl

if TYPE_CHECKING:
    from wanda_lightning.core.allocation import Allocation
    from wanda_lightning.core.criteria import Criterion
    from wanda_lightning.core.patterns import Pattern
    from wanda_lightning.core.solvers import Solver
    from wanda_lightning.training import Recovery

SEQUENTIAL_CHOICES = ("block", "layer", "none")

_Choice = TypeVar("_Choice")
Table = Mapping[str, Callable[[], _Choice]]  # by name

PATTERNS: Table[Pattern] = {
    "unstructured_row": lambda: wl.Unstructured(group="row"),
    "unstructured_layer": lambda: wl.Unstructured(group="layer"),
    "unstructured_layer_weighted": lambda: wl.Unstructured(group="layer", weigh_rows=None),
    "equal_share": lambda: wl.EqualShare(),
    "structured": lambda: wl.Structured(),
    "experts": lambda: wl.Experts(),
    "experts_reap": lambda: wl.Experts(average=True),
    "2:4": lambda: wl.NM(n=2, m=4),
    "4:8": lambda: wl.NM(n=4, m=8),
}

ALLOCATIONS: Table[Allocation] = {
    "uniform": lambda: wl.Uniform(),
    "owl": lambda: wl.OWL(),
    "owl_layer": lambda: wl.OWL(per="layer"),
    "fisher": lambda: wl.Fisher(),
    "fisher_seconds": lambda: wl.Fisher(cost="seconds"),
}

RECOVERIES: Table[Recovery] = {
    "none": lambda: wl.NoRecovery(),
    "reconstruct": lambda: wl.Reconstruct(),
    "distill": lambda: wl.Distill(),
}


def _zero_out() -> Solver:
    return wl.ZeroOut()


def _saliency() -> Criterion:
    from wanda_lightning.core.criteria import Saliency

    return Saliency()


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


METHODS: Mapping[str, Method] = {
    "wanda": Method(lambda: wl.Wanda()),
    "magnitude": Method(lambda: wl.Magnitude()),
    "ria": Method(lambda: wl.RIA()),
    "sparsegpt": Method(solver=lambda: wl.SparseGPT()),
    "ablate_mag_seq": Method(lambda: wl.Magnitude(), lambda: wl.SparseGPT(mask="upfront")),
    "ablate_wanda_seq": Method(lambda: wl.Wanda(), lambda: wl.SparseGPT(mask="upfront")),
    "ablate_mag_iter": Method(lambda: wl.Magnitude(), lambda: wl.SparseGPT()),
    "ablate_wanda_iter": Method(lambda: wl.Wanda(), lambda: wl.SparseGPT()),
    "refit": Method(solver=lambda: wl.Refit()),
    "admm": Method(solver=lambda: wl.ADMM()),
}

BEST = Method(
    solver=lambda: wl.ADMM(),
    group="layer_weighted",
    sequential="one_pass",
    # 8 windows of at least 512 tokens each, or 4096 images. The gradients of 8 images would be far too noisy.
    allocation=lambda: wl.Fisher(num_samples=8, num_predictions=4096),
)

PRESETS: Mapping[str, Method] = {
    "fast": Method(lambda: wl.Wanda(), sequential="one_pass"),
    "balanced": Method(solver=lambda: wl.ADMM(iterations=6), group="layer", sequential="one_pass"),
    "best": BEST,
    "thorough": replace(BEST, recovery=RECOVERIES["distill"]),
}

CRITERIA: Table[Criterion] = {
    name: method.criterion
    for name, method in METHODS.items()
    if method.criterion and method.solver is _zero_out
} | {"saliency": _saliency}

SOLVERS: Table[Solver] = {"zero_out": _zero_out} | {
    name: method.solver
    for name, method in METHODS.items()
    if method.criterion is None and method.recovery is RECOVERIES["none"]
}
