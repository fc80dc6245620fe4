"""Choices that belong together, under one name: the methods of the papers, and what we recommend."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from wanda_lightning.core.allocation import Allocation, Fisher, Uniform
from wanda_lightning.core.criteria import RIA, Criterion, Magnitude, Wanda
from wanda_lightning.core.patterns import NM, Pattern, Unstructured, pattern_named
from wanda_lightning.core.solvers import ADMM, Reconstruct, Refit, Solver, SparseGPT, ZeroOut

Group = Literal["row", "layer"]


class Method(NamedTuple):
    """Choices for `prune`, all but how much and where.

    Attributes:
        criterion: None is the solver's own.
        solver: Gives the final weights.
        group: What unstructured pruning compares.
        sequential: What the statistics see; None is the model's usual one.
        allocation: Spreads the sparsity over the layers.
    """

    criterion: Criterion | None = None
    solver: Solver = ZeroOut()
    group: Group = "row"
    sequential: str | None = None
    allocation: Allocation = Uniform()

    def choices(self, pattern: Pattern | str = "unstructured") -> dict[str, Any]:
        """As keywords of `prune` and `PruningCallback`.

        Only unstructured zeros are spread by the allocation: 2:4 in some layers and 1:4 in others is not 2:4.
        """
        if pattern == "unstructured":
            pattern = Unstructured(self.group)
        pattern = pattern_named(pattern) if isinstance(pattern, str) else pattern
        chosen = {
            "criterion": self.criterion,
            "solver": self.solver,
            "pattern": pattern,
            "allocation": Uniform() if isinstance(pattern, NM) else self.allocation,
        }
        return chosen if self.sequential is None else {**chosen, "sequential": self.sequential}


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "magnitude": Method(Magnitude(), group="layer"),
        "wanda": Method(Wanda()),
        "ria": Method(RIA()),
        "sparsegpt": Method(solver=SparseGPT(), group="layer"),
        "ablate_mag_seq": Method(Magnitude(), SparseGPT(mask="upfront"), "layer"),
        "ablate_wanda_seq": Method(Wanda(), SparseGPT(mask="upfront")),
        "ablate_mag_iter": Method(Magnitude(), SparseGPT(), "layer"),
        "ablate_wanda_iter": Method(Wanda(), SparseGPT(), "layer"),
        "refit": Method(solver=Refit()),
        "admm": Method(solver=ADMM()),
        "reconstruct": Method(solver=Reconstruct(ADMM()), sequential="block"),
    }
)

PRESETS: Mapping[str, Method] = MappingProxyType(
    {
        "fast": Method(Wanda(), sequential="layer"),
        "balanced": Method(solver=ADMM(iterations=6), group="layer", sequential="layer"),
        "best": Method(solver=ADMM(), group="layer", sequential="layer", allocation=Fisher(num_samples=8)),
    }
)


def preset_named(name: str) -> Method:
    """The preset of a name.

    Raises:
        ValueError: If there is none.
    """
    if name not in PRESETS:
        raise ValueError(f"no preset is called {name!r}: use one of {', '.join(PRESETS)}")
    return PRESETS[name]
