"""Read the blocks of a model when the batches arrive at them, and write them when they are pruned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any

from wanda_lightning.calibration.lockstep import Call, lockstep
from wanda_lightning.calibration.observer import Observation, Observer
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.progress import ProgressBar
from wanda_lightning.models import Layer, Stop
from wanda_lightning.planning.plan import Plan, Selections, refuse_unprunable
from wanda_lightning.planning.run import Run, WeightStore
from wanda_lightning.streaming.checkpoint import RESIDENT, BlockLoader, Checkpoint, Keys
from wanda_lightning.streaming.output_folder import OutputFolder, PartRecord


class StreamedWeights(WeightStore):
    """Reads each block when the batches arrive at it, and writes it when they have left it.

    The model must be pruned inside `blocks.loading()`.
    """

    advice = "What is written stays: start again with the same choices to continue."

    def __init__(self, checkpoint: Checkpoint, output: OutputFolder) -> None:
        self.blocks = BlockLoader(
            checkpoint, self._stored, lambda block: self._changes.get(block, lambda: None)()
        )
        self._checkpoint = checkpoint
        self._output = output
        self._is_dense = False
        self._changes: dict[str, Callable[[], None]] = {}  # by block
        # The parts of the stops at which no batch has stopped yet, by stop; None before the first stop
        self._ahead: dict[str, str] | None = None

    def _stored(self, block: str) -> Keys | None:
        return (
            self._output.stored(block)
            if block in self._output.written and not self._is_dense
            else None
        )

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Read all blocks from the checkpoint, also those that an interrupted run has written; free them at the end."""
        self._is_dense = True
        try:
            yield
        finally:
            self._is_dense = False
            self.blocks.reset()

    def check(self, layers: Sequence[Layer]) -> None:
        """Do nothing: the weights are checked when they are read."""

    def observe_dense(self, run: Run, observer: Observer, bar: ProgressBar) -> Observation:
        """Observe all layers in one pass through the dense model, block by block."""
        bar.expect(len(run.plan.places))
        with self.dense():
            plan = run.plan
            samples = run.samples.in_memory()
            for stop, calls in lockstep(
                plan.places, samples, plan.processes, to_end=True, model=plan.model
            ):
                bar.show(stop.name)
                bar.advance()
                self.load(stop.name)
                calls[:] = [observer.watched(stop, call) for call in calls]
        return observer.finish(run.plan.whole_model)

    def passed(self, run: Run, watched: Callable[[Call], Call], bar: ProgressBar) -> Iterator[Stop]:
        """Yield each block when all samples have left it, before it is written; also those of an interrupted run."""
        names = self._checkpoint.blocks
        begun = {*self._output.written}
        is_dense = run.plan.config.sequential == "none"
        places = {stop.name: stop for stop in run.plan.places}
        blocks = [
            places.get(name) or Stop(name, run.plan.model.get_submodule(name), ()) for name in names
        ]
        is_complete = begun.issuperset(names)
        if is_dense and not is_complete:
            yield from self._pass_dense(run, blocks, watched, bar)
            return
        for block in blocks:
            if block.name in begun:
                self._restore(self._output.written[block.name], run)
                yield block
                self._checkpoint.unload(block.name)
        if is_complete:
            run.samples.count()
        else:
            yield from super().passed(run, watched, bar)

    def _pass_dense(
        self, run: Run, blocks: Sequence[Stop], watched: Callable[[Call], Call], bar: ProgressBar
    ) -> Iterator[Stop]:
        """Yield each block; it is loaded when the one before is written."""
        begun = {*self._output.written}
        left = list[Stop]()
        samples = run.samples.in_memory()
        bar.expect(len(blocks))

        def leave() -> Iterator[Stop]:
            if passed := run.done.passed.again | run.done.passed.late:
                raise UserError(
                    "pattern='experts' from disk needs blocks that are called once, in one order, but the model calls "
                    f"{min(passed)} again. Use sequential='block', or prune in memory."
                )
            while left:
                yield left[0]
                self._store(left.pop().name, run)

        visits = lockstep(
            blocks, samples, run.plan.processes, run.done.passed, model=run.plan.model
        )
        with self.dense(), closing(visits) as stops:
            for number, (stop, calls) in enumerate(stops, 1):
                yield from leave()
                bar.show(stop.name)
                bar.advance()
                self.blocks.load(stop.name)
                left.append(stop)
                if stop.name in begun:
                    self._restore(self._output.written[stop.name], run)
                elif number < len(blocks):
                    calls[:] = map(watched, calls)
                else:  # no sample continues after the last one
                    for call in calls:
                        watched(call).run(on_copies=True)
            yield from leave()

    def undo(self, change: Callable[[], None]) -> None:
        """Do nothing: the changed weights are not in memory any more, and are read again."""

    def load(self, name: str) -> None:
        """Load the block of a layer or stop, and free all others."""
        if (part := self._checkpoint.part_of(name)) != RESIDENT:
            self.blocks.load_only(part)

    def repeat(self, block: str, change: Callable[[], None]) -> None:
        """Call `change` whenever the block is read from the checkpoint."""
        self._changes[block] = change

    def recall(self, plan: Plan) -> Selections:
        """Return the selections that an interrupted run has stored; empty if there are none."""
        return (
            plan.selections(self._output.progress.sparsities)
            if self._output.progress.sparsities
            else {}
        )

    def keep(self, selections: Selections) -> None:
        """Store the sparsities, so that a run that continues this one does not compute them again."""
        self._output.save_progress(
            sparsities={name: each.sparsity for name, each in selections.items()}
        )

    def arrive(self, stop: Stop, run: Run) -> bool:
        """Write and free the blocks that all batches have left, and load the stop's block."""
        part = self._checkpoint.part_of(stop.name)
        if self._ahead is None:
            self._ahead = {
                each.name: self._checkpoint.part_of(each.name) for each in run.plan.stops
            }
        self._ahead.pop(stop.name, None)
        # A batch may be parked ahead, in a block that is loaded.
        needed = {
            part,
            *self._ahead.values(),
        }
        for block in [block for block in self.blocks.loaded if block not in needed]:
            self._store(block, run)
        if part != RESIDENT:
            self.blocks.load(part)
        is_pruned = part != RESIDENT and part in self._output.written
        if is_pruned:
            self._restore(self._output.written[part], run)
        else:
            refuse_unprunable(stop.layers)
        return is_pruned

    def finish(self, run: Run) -> None:
        """Write the remaining blocks, and the weights outside of all blocks."""
        for block in [*self.blocks.loaded]:
            self._store(block, run)
        for block in self._checkpoint.blocks:
            if block not in self._output.written:  # no batch called it
                self.blocks.load(block)
                self._store(block, run)
        self._write(RESIDENT, run)

    @property
    def zeros(self) -> int:  # type: ignore[override]
        """Number of zeros in the stored blocks."""
        return sum(
            record.zeros for part, record in self._output.written.items() if part != RESIDENT
        )

    def _store(self, block: str, run: Run) -> None:
        """Write a block unless it is written already, and free it."""
        if block not in self._output.written:
            self._write(block, run)
        self.blocks.free(block)

    def _write(self, part: str, run: Run) -> None:

        def own(found: Mapping[str, Any]) -> dict[str, Any]:
            return {
                name: each for name, each in found.items() if self._checkpoint.part_of(name) == part
            }

        layers = list(own(run.done.layers).values())
        skipped = list(own(run.done.skipped).values())
        zeros = sum(
            int((weight == 0).count_nonzero())
            for weight in self._checkpoint.parameters(part).values()
        )
        record = PartRecord(
            layers, skipped, own(run.done.few_tokens), own(run.done.zero_units), zeros
        )
        self._output.save(part, self._checkpoint.as_stored(part), record)

    @staticmethod
    def _restore(record: PartRecord, run: Run) -> None:
        """Copy what an earlier run did to a part into the run."""
        run.done.layers |= {each.name: each for each in record.layers}
        run.done.skipped |= {each.name: each for each in record.skipped}
        run.done.few_tokens |= record.few_tokens
        run.done.zero_units |= record.zero_units
