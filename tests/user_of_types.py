"""What mypy says of a user's code: it fails if a line marked `type: ignore` has no error, or another one."""

from dataclasses import dataclass

from torch import Tensor, nn

from wanda_lightning import PruningCallback, ShrinkCallback, WandaPrune, prune, shrink
from wanda_lightning.core import Criterion, InputStatistics


@dataclass(frozen=True)
class Power(Criterion):
    """A criterion outside of the package."""

    needs = frozenset({"square_sum"})
    power: float = 0.5

    def __call__(self, weight: Tensor, inputs: InputStatistics) -> Tensor:
        """Score by `|W| * ||x||^power`."""
        return weight.float().abs() * inputs.norm() ** self.power


def right(model: nn.Module) -> None:
    """Calls without an error."""
    WandaPrune(0.5, pattern="2:4", num_samples=8)
    PruningCallback(0.5, method="sparsegpt", criterion="wanda", skip=["lm_head"])
    prune(model, method="wanda")
    prune(model, criterion=Power(power=0.3))
    shrink(model, units=0.5, by="loss", skip="lm_head")
    ShrinkCallback(experts=0.25)


def wrong(model: nn.Module) -> None:
    """Misspelled names, arguments that a class does not take, wrong types."""
    from wanda_lightning import WandaPrun  # type: ignore[attr-defined]

    WandaPrun()
    WandaPrune(spasity=0.5)  # type: ignore[call-arg]
    prune(model, methode="wanda")  # type: ignore[call-arg]
    prune(model, skip=3)  # type: ignore[arg-type]
    shrink(model, unit=0.5)  # type: ignore[call-arg]
    shrink(model, units=0.5, by="time")  # type: ignore[arg-type]
