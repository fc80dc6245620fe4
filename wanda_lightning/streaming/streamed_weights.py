"""Store the blocks of a model as they are pruned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from wanda_lightning.calibration.parking import MakeParking, Parking
from wanda_lightning.common.words import as_size
from wanda_lightning.engine.notes import Outcome
from wanda_lightning.engine.plan import Plan, Selections
from wanda_lightning.engine.refusals import refuse_unprunable
from wanda_lightning.engine.store import WeightStore
from wanda_lightning.models import Layer, Unit
from wanda_lightning.streaming.block_loader import BlockLoader
from wanda_lightning.streaming.checkpoint import Checkpoint, Keys
from wanda_lightning.streaming.output_folder import OutputFolder, PartRecord
from wanda_lightning.streaming.parts import RESIDENT


class StreamedWeights(WeightStore):
    """Reads each block when the batches arrive at it, and writes it when they have left it.

    At most two blocks are in memory: the one that is pruned, and the next one.

    Args:
        checkpoint: The model.
        output: Where its parts are written.
        make_parking: Keeps the activations of one batch while it waits at a unit.
    """

    is_whole = False
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

    def hold(self, name: str) -> None:
        """Have the block of a layer or a unit in memory, and no other one except the next."""
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

    def arrive(self, unit: Unit, outcome: Outcome) -> bool:
        """Write and free the blocks that all batches have left, and have the unit's block in memory."""
        processes = outcome.plan.processes
        with processes.fail_together():
            is_done = self._arrive(unit, outcome)
            if processes.world_size > 1:
                self._blocks.finish()  # another process may read what the first one has written
            return is_done

    def _arrive(self, unit: Unit, outcome: Outcome) -> bool:
        part = self._checkpoint.part_of(f"{unit.name}.")
        if self._pending is None:
            names = [each.name for each in outcome.plan.units]
            self._pending = {(self._checkpoint.part_of(f"{name}."), name) for name in names}
        self._pending.discard((part, unit.name))
        unfinished = {block for block, _ in self._pending}  # a batch may be parked ahead, in a block that is loaded
        for block in [block for block in self._blocks.loaded if block != part and block not in unfinished]:
            self._store(block, outcome)
        if part == RESIDENT:
            refuse_unprunable(unit.layers)
            return False
        self._blocks.require(part)
        self._blocks.expect_next(part)
        if part in self._output.written:
            self._recall(part, outcome)
            return True
        refuse_unprunable(unit.layers)
        return False

    def finish(self, outcome: Outcome) -> None:
        """Write what is left, and wait until all is written."""
        with outcome.plan.processes.fail_together():
            self._finish(outcome)

    def _finish(self, outcome: Outcome) -> None:
        self._blocks.expect_nothing()
        for block in list(self._blocks.loaded):
            self._store(block, outcome)
        self._blocks.finish()
        for block in self._checkpoint.blocks:
            if block not in self._output.written:  # no batch called it
                self._blocks.require(block)
                self._store(block, outcome)
        self._blocks.finish()
        self._write(RESIDENT, self._record(RESIDENT, outcome))

    @property
    def status(self) -> str:  # type: ignore[override]
        """Bytes read and written so far, in words."""
        read, written = as_size(self._checkpoint.bytes_read), as_size(self._output.bytes_written)
        return f", {read} read, {written} written"

    @property
    def zeros(self) -> int:  # type: ignore[override]
        """Number of zeros in the stored blocks."""
        return sum(record.zeros for part, record in self._output.written.items() if part != RESIDENT)

    def _store(self, block: str, outcome: Outcome) -> None:
        """Write a block unless it is written already, and free it, both in the background."""
        if block in self._output.written:
            self._blocks.free(block)
        else:
            self._blocks.free(block, partial(self._write, block, self._record(block, outcome)))

    def _write(self, part: str, record: PartRecord) -> None:
        parameters = self._checkpoint.model.named_parameters()
        own = [parameter for name, parameter in parameters if self._checkpoint.part_of(name) == part]
        zeros = sum(int((parameter == 0).count_nonzero()) for parameter in own)
        self._output.save(part, self._checkpoint.stored(part), replace(record, zeros=zeros))

    def _record(self, part: str, outcome: Outcome) -> PartRecord:
        """Return what happened to a part."""
        names = {layer.name for layer in outcome.plan.layers if self._lies_in(part, layer)}
        return PartRecord(
            [layer for name, layer in outcome.layers.items() if name in names],
            [matrix for name, matrix in outcome.skipped.items() if name in names],
            {name: tokens for name, tokens in outcome.few_tokens.items() if name in names},
        )

    def _lies_in(self, part: str, layer: Layer) -> bool:
        return self._checkpoint.part_of(layer.name) == part

    def _recall(self, part: str, outcome: Outcome) -> None:
        """Copy what an earlier run did to a part into the outcome."""
        record = self._output.written[part]
        outcome.layers |= {each.name: each for each in record.layers}
        outcome.skipped |= {each.name: each for each in record.skipped}
        outcome.few_tokens = {**outcome.few_tokens, **record.few_tokens}
