"""Read the blocks of a model when the batches arrive at them, and write them when they are pruned."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from typing import TypeVar

from torch import Tensor

from wanda_lightning.calibration.lockstep import Visit, Visits, lockstep
from wanda_lightning.calibration.observer import Observation, StopObserver
from wanda_lightning.common.progress import ProgressBar
from wanda_lightning.core.allocation import Sparsities
from wanda_lightning.loop.plan import refuse_unprunable
from wanda_lightning.loop.run import Restore, Run, WeightStore
from wanda_lightning.models import Layer, ReadWeight
from wanda_lightning.streaming.checkpoint import RESIDENT, BlockLoader, Checkpoint, Keys
from wanda_lightning.streaming.output_folder import OutputFolder, PartRecord

_Value = TypeVar("_Value")


class StreamedWeights(WeightStore):
    """Reads each block when the batches arrive at it, and writes it when they have left it.

    The model must be pruned inside `blocks.loading()`.
    """

    advice = "What is written stays: start again with the same choices to continue."

    def __init__(self, checkpoint: Checkpoint, output: OutputFolder) -> None:
        self.blocks = BlockLoader(checkpoint, self._written_block)
        self._checkpoint = checkpoint
        self._output = output
        self._is_dense = False

    @property
    def zeros(self) -> int:  # type: ignore[override]
        """Number of zeros in the blocks that are written."""
        written = self._output.written
        return sum(record.zeros for part, record in written.items() if part != RESIDENT)

    def check(self, layers: Sequence[Layer]) -> None:
        """Do nothing: the weights are checked when they are read."""

    # The dense model, before anything is pruned

    def dense_visits(self, visits: Visits) -> Iterator[Visit]:
        """Load the block of each stop, and free all others."""
        with self._dense(), self.blocks.visiting(visits.stops):
            for visit in visits:
                self._load_only(visit.stop.name)
                yield visit

    @contextmanager
    def dense_reader(self) -> Iterator[ReadWeight]:
        """Return a function that loads the block of a layer, and returns the layer's weight."""

        def read(layer: Layer) -> Tensor:
            self._load_only(layer.name)
            return layer.read()

        with self._dense():
            yield read

    def observe_dense(self, run: Run, observer: StopObserver, bar: ProgressBar) -> Observation:
        """Observe all layers in one pass through the dense model, block by block.

        Nothing runs if an earlier run has written all blocks.
        """
        plan = run.plan
        if self._output.written.keys() >= {*self._checkpoint.blocks}:
            run.samples.count()
            return observer.finish(plan.whole_model)

        stops = plan.blocks_and_layers
        bar.expect(len(stops))
        samples = run.samples.in_memory()
        visits = lockstep(stops, samples, plan.processes, to_end=True, model=plan.model)
        with closing(visits):
            for visit in self.dense_visits(visits):
                bar.show(visit.stop.name)
                bar.advance()
                visit.continue_by(partial(observer.watched, visit.stop))
        return observer.finish(plan.whole_model)

    # Sparsities that an interrupted run has chosen

    def stored_sparsities(self) -> Sparsities:
        """Return the sparsities that an interrupted run has stored; empty if there are none."""
        return self._output.progress.sparsities

    def store_sparsities(self, sparsities: Sparsities) -> None:
        """Store the sparsities in the output folder."""
        self._output.save_progress(sparsities=dict(sparsities))

    # The model while it is pruned

    def visits(self, run: Run, bar: ProgressBar, restore: Restore) -> Generator[Visit]:
        """Yield the stops that no earlier run has pruned, with their weights in memory.

        A block is written and freed when all batches have left it.
        """
        self._restore_written(run, restore)
        block_of_remaining = {
            stop.name: self._checkpoint.part_of(stop.name) for stop in run.plan.stops
        }
        with closing(super().visits(run, bar, restore)) as visits:
            for visit in visits:
                block = block_of_remaining.pop(visit.stop.name)
                # Keep the blocks with stops still to come: some batches may already wait there.
                self._store_all_but({block, *block_of_remaining.values()}, run)
                # Batches also run through a block that is written already, but it is not pruned again.
                if block != RESIDENT:
                    self.blocks.load(block)
                if block == RESIDENT or block not in self._output.written:
                    refuse_unprunable(visit.stop.layers)
                    yield visit

    def finish(self, run: Run) -> None:
        """Write the remaining blocks, and the weights outside of all blocks."""
        self._store_all_but(set(), run)
        for block in self._checkpoint.blocks:
            if block not in self._output.written:  # no batch called it
                self.blocks.load(block)
                self._store(block, run)
        self._write(RESIDENT, run)

    @contextmanager
    def _dense(self) -> Iterator[None]:
        """Read all blocks from the checkpoint, also those that an interrupted run has written; free them at the end."""
        self._is_dense = True
        try:
            yield
        finally:
            self._is_dense = False
            self.blocks.reset()

    def _written_block(self, block: str) -> Keys | None:
        """Return where a block that is written is stored; None for the dense one."""
        if self._is_dense or block not in self._output.written:
            return None
        return self._output.stored(block)

    def _load_only(self, name: str) -> None:
        """Load the block of a layer or stop, and free all others."""
        block = self._checkpoint.part_of(name)
        if block != RESIDENT:
            self.blocks.load_only(block)

    def _store_all_but(self, needed: set[str], run: Run) -> None:
        for block in list(self.blocks.loaded):
            if block not in needed:
                self._store(block, run)

    def _store(self, block: str, run: Run) -> None:
        """Write a block unless it is written already, and free it."""
        if block not in self._output.written:
            self._write(block, run)
        self.blocks.free(block)

    def _write(self, part: str, run: Run) -> None:
        def of_part(records: Mapping[str, _Value]) -> dict[str, _Value]:
            part_of = self._checkpoint.part_of
            return {name: record for name, record in records.items() if part_of(name) == part}

        weights = self._checkpoint.parameters(part).values()
        done = run.done
        record = PartRecord(
            layers=list(of_part(done.layers).values()),
            skipped=list(of_part(done.skipped).values()),
            few_tokens=of_part(done.few_tokens),
            zero_units=of_part(done.zero_units),
            zeros=sum(int((weight == 0).count_nonzero()) for weight in weights),
        )
        if self._checkpoint.copies:
            tensors = self._checkpoint.copied(part, done.kept)
        else:
            tensors = self._checkpoint.as_stored(part)
        self._output.save(part, tensors, record)

    def _restore_written(self, run: Run, restore: Restore) -> None:
        """Copy what an earlier run did to the blocks that it has written into the run, and give these their shapes."""
        stops = {stop.name: stop for stop in run.plan.blocks_and_layers}
        for block in self._checkpoint.blocks:
            record = self._output.written.get(block)
            if record is None:
                continue
            done = run.done
            done.layers.update({layer.name: layer for layer in record.layers})
            done.skipped.update({matrix.name: matrix for matrix in record.skipped})
            done.few_tokens.update(record.few_tokens)
            done.zero_units.update(record.zero_units)
            if block in stops:
                restore(stops[block].layers)
                # The smaller weights are copies in full size of what is not in memory.
                self._checkpoint.unload(block)
