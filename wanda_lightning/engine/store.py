"""The weights and activations of a model during a pruning run: in memory, or wherever a subclass keeps them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from wanda_lightning.calibration.parking import MakeParking, Parking
from wanda_lightning.engine.notes import Outcome
from wanda_lightning.engine.plan import Plan, Selections
from wanda_lightning.models import Unit


class WeightStore:
    """All weights and activations stay in memory.

    Attributes:
        is_whole: Whether all weights are in memory at the same time.
        zeros: Number of zeros among the weights that are not in memory.
        advice: What to do if pruning fails halfway.
        status: What to show beside the name of a unit, for example what has been read so far.
        make_parking: Keeps the activations of one batch while it waits at a unit.
    """

    is_whole: bool = True
    zeros: int = 0
    advice: str = "Reload the model before you try again."
    status: str = ""
    make_parking: MakeParking = Parking

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Give access to the weights before pruning, in one pass through the model in this block."""
        yield

    def hold(self, name: str) -> None:
        """Have the dense weights of a layer or a unit in memory."""

    def repeat(self, block: str, change: Callable[[], None]) -> None:
        """Apply `change` to the dense weights of a block again each time they are read."""

    def recall(self, plan: Plan) -> Selections:
        """Return the selections that an earlier run has made; empty if there are none."""
        return {}

    def keep(self, selections: Selections) -> None:
        """Keep the selections for a later run that continues this one."""

    def arrive(self, unit: Unit, outcome: Outcome) -> bool:
        """Prepare a unit that is about to be pruned; return whether an earlier run has pruned it already."""
        return False

    def finish(self, outcome: Outcome) -> None:
        """Store what is left, after the last unit."""
