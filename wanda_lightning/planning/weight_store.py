"""Where the weights of a model are while it is pruned: in memory. `StreamedWeights` keeps them on disk."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

from torch import Tensor

from wanda_lightning.calibration.lockstep import Visit, Visits, lockstep
from wanda_lightning.calibration.observer import Observation
from wanda_lightning.common.progress import ProgressBar
from wanda_lightning.models import Layer
from wanda_lightning.planning.plan import refuse_unprunable

if TYPE_CHECKING:
    from wanda_lightning.planning.removal import StopObserver
    from wanda_lightning.planning.run import Run


class WeightStore:
    """All weights stay in memory."""

    zeros: int = 0  # among the weights that are not in memory
    advice: str = "Reload the model before you try again."  # if pruning fails halfway

    def check(self, layers: Sequence[Layer]) -> None:
        """Refuse weights that are in memory and cannot be pruned."""
        refuse_unprunable(layers)

    # The dense model, before anything is pruned

    def dense_visits(self, visits: Visits) -> Iterator[Visit]:
        """Yield the visits, each with the dense weights of its stop in memory."""
        yield from visits

    @contextmanager
    def dense_reader(self) -> Iterator[Callable[[Layer], Tensor]]:
        """Return a function that returns the dense weight of a layer, called in model order."""
        yield Layer.read

    def observe_dense(self, run: Run, observer: StopObserver, bar: ProgressBar) -> Observation:
        """Observe all layers in one pass of all samples through the dense model."""
        bar.expect(run.samples.length)
        return observer.whole_model(run.plan.whole_model, run.samples, bar.advance)

    def change_when_loaded(self, block: str, change: Callable[[], None]) -> None:
        """Apply `change` again whenever the dense weights of a block are loaded; they have seen it once."""

    def undo_change(self, change: Callable[[], None]) -> None:
        """Call `change`, which takes back a change of the dense weights of a block after their visit."""
        change()

    # Sparsities that an interrupted run has chosen

    def stored_sparsities(self) -> Mapping[str, float]:
        """Return the sparsities that an earlier run has chosen; empty if there are none."""
        return {}

    def store_sparsities(self, sparsities: Mapping[str, float]) -> None:
        """Store the sparsities for a later run that continues this one."""

    # The model while it is pruned

    def visits(self, run: Run, bar: ProgressBar) -> Generator[Visit]:
        """Yield each stop before it is pruned, with the calls that wait there; these then run through what is pruned.

        No sample waits there if nothing is left to observe or to record.
        """
        plan = run.plan
        bar.expect(len(plan.stops))
        waits = plan.config.recovery.trains_blocks or not plan.is_one_pass
        if not (plan.observed and waits):
            for stop in plan.stops:
                yield Visit(stop, [])
                bar.advance()
            return

        samples = run.samples.in_memory()
        with closing(lockstep(plan.stops, samples, plan.processes, model=plan.model)) as visits:
            run.done.passed = visits.passed
            for visit in visits:
                yield visit
                bar.advance()

    def finish(self, run: Run) -> None:
        """Write what is left, after the last stop."""
