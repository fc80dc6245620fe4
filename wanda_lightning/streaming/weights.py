"""Store the blocks of a model as they are pruned."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from torch import nn

from wanda_lightning.calibration.gradients import gradient_statistics_by_block
from wanda_lightning.calibration.observer import Observer
from wanda_lightning.calibration.parking import MakeParking, Parking
from wanda_lightning.calibration.unit_stops import KnownStop, UnitStop, watch_units
from wanda_lightning.common.progress import ProgressBar
from wanda_lightning.common.words import as_size
from wanda_lightning.config import PruningConfig
from wanda_lightning.core.statistics import GradientStatistics, InputStatistics
from wanda_lightning.engine.plan import Plan, Selections, make_plan
from wanda_lightning.engine.refusals import refuse_unprunable
from wanda_lightning.engine.run import Run
from wanda_lightning.engine.store import WeightStore
from wanda_lightning.models import Layer, Unit
from wanda_lightning.parallel import Processes
from wanda_lightning.streaming.block_loader import BlockLoader
from wanda_lightning.streaming.checkpoint import Checkpoint, Keys
from wanda_lightning.streaming.output import OutputFolder, PartRecord
from wanda_lightning.streaming.parts import RESIDENT


class StreamedWeights(WeightStore):
    """Reads each block when the batches arrive at it, and writes it when they have left it.

    At most two blocks are in memory: the one that is pruned, and the next one.

    Args:
        checkpoint: The model.
        output: Where its parts are written.
        make_parking: Keeps the activations of one batch while it waits at a unit.
    """

    advice = "What is written stays: start again with the same choices to continue."

    def __init__(self, checkpoint: Checkpoint, output: OutputFolder, make_parking: MakeParking = Parking) -> None:
        self.make_parking = make_parking
        self._checkpoint, self._output = checkpoint, output
        self._is_dense = False
        self._blocks = BlockLoader(checkpoint, self._stored, self._change)
        self._changes: dict[str, Callable[[], None]] = {}  # by block
        # (block, unit) of the units at which no batch has stopped yet; None before the first stop
        self._pending: set[tuple[str, str]] | None = None

    def _stored(self, block: str) -> Keys | None:
        return self._output.stored(block) if block in self._output.written and not self._is_dense else None

    @contextmanager
    def streaming(self) -> Iterator[None]:
        """Read and write the blocks of the model that is pruned in this context."""
        with self._blocks.loading():
            yield

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Read all blocks from the checkpoint, also those that an interrupted run has written; free them at the end."""
        self._is_dense = True
        try:
            yield
        finally:
            self._is_dense = False
            self._blocks.start_again()

    def plan(self, config: PruningConfig, model: nn.Module, processes: Processes) -> Plan:
        """Find what will be pruned, without the weights."""
        return make_plan(config, model, processes, has_weights=False)

    def observe_dense(self, run: Run, observer: Observer, bar: ProgressBar) -> Mapping[str, InputStatistics]:
        """Return the statistics of all layers from one pass through the dense model, block by block."""
        bar.expect(len(run.plan.parts))
        return self._watch(run, observer, bar)

    def _watch(self, run: Run, observer: Observer, bar: ProgressBar) -> Mapping[str, InputStatistics]:
        with self.dense():
            for unit in watch_units(run.plan.parts, run.samples, observer, self.hold):
                bar.show(f"{unit.name}{self.status}")
                bar.advance()
        return observer.finish(run.plan.whole_model)

    def pass_backward(self, run: Run, bar: ProgressBar) -> Mapping[str, GradientStatistics]:
        """Return the gradient statistics of all layers, block by block in each direction."""

        def hold(name: str) -> None:
            bar.show(f"{name}{self.status}")
            self.hold(name)

        plan, limit = run.plan, run.plan.config.allocation.gradient_limit
        with self.dense():
            return gradient_statistics_by_block(plan.model, plan.layers, plan.block_units, run.samples, hold, limit)

    def stops(self, run: Run, observer: Observer, bar: ProgressBar) -> Generator[UnitStop]:
        """Stop at each unit; with `sequential="none"`, all statistics are collected before the first stop."""
        return self._known_stops(run, observer, bar) if run.plan.is_one_pass else super().stops(run, observer, bar)

    def _known_stops(self, run: Run, observer: Observer, bar: ProgressBar) -> Generator[UnitStop]:
        bar.expect(2 * len(run.plan.units))
        inputs = self._watch(run, observer, bar)
        if not run.selections:
            run.allocate(lambda: (inputs, {}))
        for unit in run.plan.units:
            yield KnownStop(unit, inputs)

    def undo(self, change: Callable[[], None]) -> None:
        """Do nothing: the changed weights are not in memory any more, and are read again."""

    def hold(self, name: str) -> None:
        """Load the block of a layer or a unit; evict all others except the prefetched one."""
        if (part := self._checkpoint.part_of(f"{name}.")) != RESIDENT:
            self._blocks.hold(part)

    def repeat(self, block: str, change: Callable[[], None]) -> None:
        """Call `change` whenever the block is read from the checkpoint."""
        self._changes[block] = change

    def _change(self, block: str) -> None:
        if block in self._changes:
            self._changes[block]()

    def recall(self, plan: Plan) -> Selections:
        """Return the selections that an interrupted run has stored; empty if there are none."""
        sparsities = self._output.sparsities
        weights = {name: each.to(self._checkpoint.device) for name, each in self._output.row_weights().items()}
        is_complete = bool(sparsities) and (bool(weights) or not plan.config.pattern.weigh_rows)
        return plan.selections(sparsities, weights) if is_complete else {}

    def keep(self, selections: Selections) -> None:
        """Store the sparsities and row weights, so that a run that continues this one does not compute them again."""
        weighed = {name: each.row_weights.cpu() for name, each in selections.items() if each.pattern.weigh_rows}
        self._output.save_allocation({name: each.sparsity for name, each in selections.items()}, weighed)

    def arrive(self, unit: Unit, run: Run) -> bool:
        """Write and free the blocks that all batches have left, and have the unit's block in memory."""
        processes = run.plan.processes
        with processes.fail_together():
            is_done = self._arrive(unit, run)
            if processes.world_size > 1:
                self._blocks.finish()  # another process may read what the first one has written
            return is_done

    def _arrive(self, unit: Unit, run: Run) -> bool:
        part = self._checkpoint.part_of(f"{unit.name}.")
        if self._pending is None:
            names = [each.name for each in run.plan.units]
            self._pending = {(self._checkpoint.part_of(f"{name}."), name) for name in names}
        self._pending.discard((part, unit.name))
        unfinished = {block for block, _ in self._pending}  # a batch may be parked ahead, in a block that is loaded
        for block in [block for block in self._blocks.loaded if block != part and block not in unfinished]:
            self._store(block, run)
        if part == RESIDENT:
            refuse_unprunable(unit.layers)
            return False
        self._blocks.require(part)
        self._blocks.expect_next(part)
        if part in self._output.written:
            self._recall(part, run)
            return True
        refuse_unprunable(unit.layers)
        return False

    def finish(self, run: Run) -> None:
        """Write what is left, and wait until all is written."""
        with run.plan.processes.fail_together():
            self._finish(run)

    def _finish(self, run: Run) -> None:
        self._blocks.expect_nothing()
        for block in list(self._blocks.loaded):
            self._store(block, run)
        self._blocks.finish()
        for block in self._checkpoint.blocks:
            if block not in self._output.written:  # no batch called it
                self._blocks.require(block)
                self._store(block, run)
        self._blocks.finish()
        self._write(RESIDENT, self._record(RESIDENT, run))

    @property
    def status(self) -> str:  # type: ignore[override]
        """Bytes read and written so far, in words."""
        read, written = as_size(self._checkpoint.bytes_read), as_size(self._output.bytes_written)
        return f", {read} read, {written} written"

    @property
    def zeros(self) -> int:  # type: ignore[override]
        """Number of zeros in the stored blocks."""
        return sum(record.zeros for part, record in self._output.written.items() if part != RESIDENT)

    def _store(self, block: str, run: Run) -> None:
        """Write a block unless it is written already, and free it, both in the background."""
        if block in self._output.written:
            self._blocks.free(block)
        else:
            self._blocks.free(block, partial(self._write, block, self._record(block, run)))

    def _write(self, part: str, record: PartRecord) -> None:
        parameters = self._checkpoint.model.named_parameters()
        own = [parameter for name, parameter in parameters if self._checkpoint.part_of(name) == part]
        zeros = sum(int((parameter == 0).count_nonzero()) for parameter in own)
        self._output.save(part, self._checkpoint.stored(part), replace(record, zeros=zeros))

    def _record(self, part: str, run: Run) -> PartRecord:
        """Return what happened to a part."""
        names = {layer.name for layer in run.plan.layers if self._lies_in(part, layer)}
        return PartRecord(
            [layer for name, layer in run.layers.items() if name in names],
            [matrix for name, matrix in run.skipped.items() if name in names],
            {name: tokens for name, tokens in run.few_tokens.items() if name in names},
        )

    def _lies_in(self, part: str, layer: Layer) -> bool:
        return self._checkpoint.part_of(layer.name) == part

    def _recall(self, part: str, run: Run) -> None:
        """Copy what an earlier run did to a part into the run."""
        record = self._output.written[part]
        run.layers |= {each.name: each for each in record.layers}
        run.skipped |= {each.name: each for each in record.skipped}
        run.few_tokens |= record.few_tokens
