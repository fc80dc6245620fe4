"""The weights of a model during a pruning run, and the passes of samples through them.

They are in memory, or wherever a subclass keeps them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from wanda_lightning.calibration.gradients import gradient_statistics
from wanda_lightning.calibration.observer import Observer
from wanda_lightning.calibration.parking import MakeParking, Parking
from wanda_lightning.calibration.unit_stops import UnitStop, stop_at_units
from wanda_lightning.common.progress import ProgressBar
from wanda_lightning.config import PruningConfig
from wanda_lightning.core.statistics import GradientStatistics, InputStatistics
from wanda_lightning.engine.plan import Plan, Selections, make_plan
from wanda_lightning.engine.run import Run
from wanda_lightning.models import Unit
from wanda_lightning.parallel import Processes


class WeightStore:
    """All weights and activations stay in memory.

    Attributes:
        zeros: Number of zeros among the weights that are not in memory.
        advice: What to do if pruning fails halfway.
        status: What to show beside the name of a unit, for example what has been read so far.
        make_parking: Makes the parking of a sample.
    """

    zeros: int = 0
    advice: str = "Reload the model before you try again."
    status: str = ""
    make_parking: MakeParking = Parking

    def plan(self, config: PruningConfig, model: nn.Module, processes: Processes) -> Plan:
        """Find what will be pruned."""
        return make_plan(config, model, processes)

    # ------------------------------------------------------------------------------------------------------- passes

    def observe_dense(self, run: Run, observer: Observer, bar: ProgressBar) -> Mapping[str, InputStatistics]:
        """Return the statistics of all layers, from one pass of all samples through the dense model."""
        bar.expect(run.samples.length)
        plan, inputs = run.plan, dict[str, InputStatistics]()
        for stop in stop_at_units(plan.model, (plan.whole_model,), run.samples, plan.processes, set(), bar.advance):
            inputs |= stop.observe(observer, lambda calls: calls)
        return inputs

    def pass_backward(self, run: Run, bar: ProgressBar) -> Mapping[str, GradientStatistics]:
        """Return the gradient statistics of all layers of the dense model."""
        bar.expect(run.samples.length)
        plan, limit = run.plan, run.plan.config.allocation.gradient_limit
        return gradient_statistics(
            plan.model, plan.layers, plan.blocks, run.samples, bar.advance, plan.processes, limit
        )

    def stops(self, run: Run, observer: Observer, bar: ProgressBar) -> Generator[UnitStop]:
        """Stop at each unit before it is pruned; after each stop the samples run through the pruned unit."""
        plan = run.plan
        bar.expect(run.samples.length if plan.is_one_pass else len(plan.units))
        if not plan.observed:
            return (UnitStop(unit) for unit in plan.units)
        return stop_at_units(plan.model, plan.units, run.samples, plan.processes, run.revisited, bar.advance)

    # ------------------------------------------------------------------------------------------------------ weights

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Give access to the weights before pruning, in one pass through the model in this block."""
        yield

    def hold(self, name: str) -> None:
        """Load the dense weights of a layer or a unit."""

    def repeat(self, block: str, change: Callable[[], None]) -> None:
        """Apply `change`, which the dense weights of a block have seen, again each time they are read."""

    def undo(self, change: Callable[[], None]) -> None:
        """Call `change`, which takes back a change of the dense weights of a block after their pass."""
        change()

    # ------------------------------------------------------------------------------------------------- interrupted runs

    def recall(self, plan: Plan) -> Selections:
        """Return the selections that an earlier run has made; empty if there are none."""
        return {}

    def keep(self, selections: Selections) -> None:
        """Keep the selections for a later run that continues this one."""

    def arrive(self, unit: Unit, run: Run) -> bool:
        """Prepare a unit that is about to be pruned; return whether an earlier run has pruned it already."""
        return False

    def finish(self, run: Run) -> None:
        """Store what is left, after the last unit."""
