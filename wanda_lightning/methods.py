"""The tables of all names that users can choose. Importing this file loads neither torch nor a model library.

A method is a criterion, a solver, an allocation and a recovery under one name. A new method is one line in `METHODS`;
the tables of criteria and solvers follow from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, Literal

SEQUENTIAL_CHOICES = ("block", "layer", "none")
PARKING = ("memory", "cpu", "disk")
"""The places for the activations of waiting batches while a model is pruned from disk."""

Choice = Callable[[], Any]


def load(path: str) -> Any:
    """Import a class of this package by its path, such as `core.criteria.Wanda`."""
    module, _, name = path.rpartition(".")
    return getattr(import_module(f"wanda_lightning.{module}"), name)


def choice(path: str, **arguments: Any) -> Choice:
    """Return a function that constructs an object of the class at `path`, and imports the class only when called."""
    return lambda: load(path)(**arguments)


ZERO_OUT = choice("core.solvers.ZeroOut")
UNIFORM = choice("core.allocation.Uniform")
NO_RECOVERY = choice("training.NoRecovery")
RECONSTRUCT = choice("training.Reconstruct")
DISTIL = choice("training.Distil")
NO_PERMUTATION = choice("core.permutation.NoPermutation")
ASSIGNMENT = choice("core.permutation.Assignment")
ADMM = choice("core.solvers.ADMM")
# 8 windows of at least 512 tokens, or 4096 images: the gradients of 8 images would be far too noisy.
FISHER = choice("core.allocation.Fisher", num_samples=8, num_predictions=4096)


@dataclass(frozen=True)
class Method:
    """The choices of a method. It does not choose the sparsity and the pattern."""

    criterion: Choice | None = None  # None for the solver's own
    solver: Choice = ZERO_OUT
    # Where unstructured pruning compares weights; None for the choice of the papers of criterion and solver.
    group: Literal["row", "layer", "layer_weighted"] | None = None
    sequential: str = "auto"  # the recovery or the model decides
    allocation: Choice = UNIFORM  # not for N:M, where any other allocation mixes 2:4 layers with 1:4 layers
    recovery: Choice = NO_RECOVERY
    permutation: Choice = NO_PERMUTATION  # only for N:M


METHODS: Mapping[str, Method] = {
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
    "reconstruct": Method(solver=ADMM, recovery=RECONSTRUCT),
}

BEST = Method(solver=ADMM, group="layer_weighted", sequential="layer", allocation=FISHER, permutation=ASSIGNMENT)

PRESETS: Mapping[str, Method] = {
    "fast": Method(choice("core.criteria.Wanda"), sequential="layer"),
    "balanced": Method(solver=choice("core.solvers.ADMM", iterations=6), group="layer", sequential="layer"),
    "best": BEST,
    "thorough": replace(BEST, recovery=DISTIL),
}

CRITERIA: Mapping[str, Choice] = {
    name: method.criterion for name, method in METHODS.items() if method.criterion and method.solver is ZERO_OUT
} | {"saliency": choice("core.criteria.Saliency")}

SOLVERS: Mapping[str, Choice] = {"zero_out": ZERO_OUT} | {
    name: method.solver
    for name, method in METHODS.items()
    if method.criterion is None and method.recovery is NO_RECOVERY
}

PATTERNS: Mapping[str, Choice] = {
    "unstructured_row": choice("core.patterns.Unstructured", group="row"),
    "unstructured_layer": choice("core.patterns.Unstructured", group="layer"),
    "unstructured_layer_weighted": choice("core.patterns.Unstructured", group="layer", weigh_rows=True),
    "equal_share": choice("core.patterns.EqualShare"),
    "2:4": choice("core.patterns.NM", n=2, m=4),
    "4:8": choice("core.patterns.NM", n=4, m=8),
}

ALLOCATIONS: Mapping[str, Choice] = {
    "uniform": UNIFORM,
    "owl": choice("core.allocation.OWL"),
    "owl_layer": choice("core.allocation.OWL", per="layer"),
    "alpha": choice("core.allocation.AlphaPruning"),
    "alpha_layer": choice("core.allocation.AlphaPruning", per="layer"),
    "fisher": choice("core.allocation.Fisher"),
}

RECOVERIES: Mapping[str, Choice] = {"none": NO_RECOVERY, "reconstruct": RECONSTRUCT, "distil": DISTIL}

PERMUTATIONS: Mapping[str, Choice] = {"none": NO_PERMUTATION, "assignment": ASSIGNMENT}
