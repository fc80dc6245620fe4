"""Find the hidden units that can be taken out, by running each block.

Candidates come from shapes (`candidates.py`). A random half of the units of each is set to zero and then taken out, and
the block runs again: what it computes shows which candidate is right.
"""

from contextlib import closing
from dataclasses import replace

import torch
from torch.nn import Module

from wanda_lightning.calibration.lockstep import Visit, lockstep, whole_model_calls
from wanda_lightning.common.progress import ProgressBar
from wanda_lightning.loop.plan import Plan
from wanda_lightning.loop.run import Run
from wanda_lightning.models import Layer, SkipReason, Stop, tied_tensors
from wanda_lightning.models.layers import named_modules
from wanda_lightning.units.block_runs import BlockRuns
from wanda_lightning.units.candidates import HiddenUnits, Line, UnitsByReader, removable_units

_NONE_IS_RIGHT = -1


def find_units(run: Run) -> UnitsByReader:
    """Return the hidden units that can be taken out, by the layer that reads them.

    One sample of all processes together runs through the dense model. Blocks that it reaches again after their visit
    keep their units: such a call may use the block in another way. A model without blocks is one block.
    """
    plan = run.plan
    processes = plan.processes
    sample = run.samples.first_sample()
    samples = [] if sample is None else [sample]
    if not any(number for (number,) in processes.all_gather([len(samples)])):
        run.samples.refuse_if_empty()

    search = _UnitSearch(plan)
    if not plan.block_stops:
        calls = list(whole_model_calls(samples))
        search.search_block(Visit(Stop("", plan.model, plan.layers), calls))
        return search.units

    with (
        ProgressBar("Finding hidden units", len(plan.block_stops), run.progress) as bar,
        closing(lockstep(plan.block_stops, samples, processes, model=plan.model)) as visits,
    ):
        for visit in run.store.dense_visits(visits):
            bar.show(visit.stop.name)
            search.search_block(visit)
            bar.advance()

    # Only processes with samples there have seen it.
    passed = visits.passed
    for block in plan.block_stops:
        if not processes.all_agree(block.name not in passed):
            for layer in block.layers:
                search.units.pop(layer.name, None)
    return search.units


class _UnitSearch:
    """Finds the units of one block after the other that can be taken out."""

    def __init__(self, plan: Plan) -> None:
        self.units: dict[str, HiddenUnits] = {}  # by reader
        self._plan = plan
        modules = named_modules(plan.model)
        self._tied = tied_tensors(plan.model)
        self._layer_of = {layer.module: layer for layer in plan.layers}
        skipped_by_user = plan.inventory.skipped_for(SkipReason.USER)
        self._skipped_by_user = {modules.get(matrix.name) for matrix in skipped_by_user}
        # The same units may be found again, by another layer that reads them.
        self._used_lines: set[Line] = set()
        # Index of the right candidate for readers with the same name and shape in blocks alike.
        self._right_candidates: dict[tuple[object, ...], int] = {}

    def search_block(self, visit: Visit) -> None:
        """Find the units that layers of this block read."""
        block = visit.stop
        assert block.module is not None
        # None if another process has the sample.
        runs = None
        dense = None
        with self._plan.processes.fail_together():
            if visit.calls:
                runs = BlockRuns(block.module, visit.calls[0])
                dense = runs.run(watched=list(filter(_has_matrix, block.module.modules())))
            for layer in block.layers:
                if layer.expert is not None or layer.group is not None:
                    continue
                reads_alone = dense is None or dense.reads_alone(layer.module)
                if not self._plan.processes.all_agree(reads_alone):
                    continue
                units = self._first_right(layer, block, runs)
                if units is not None:
                    writers = tuple(self._layer_of[writer.module] for writer in units.writers)
                    self.units[layer.name] = replace(units, writers=writers)
                    self._used_lines |= units.lines

    def _first_right(
        self, reader: Layer, block: Stop, runs: BlockRuns | None
    ) -> HiddenUnits | None:
        """Return the hidden units of a reader: the first candidate that is right, if any."""
        assert block.module is not None
        name_in_block = reader.name.removeprefix(block.name)
        key = (_likeness(block.module), name_in_block, reader.shape)
        known = self._right_candidates.get(key)
        is_undecided = False
        for index, units in enumerate(removable_units(reader, block.module)):
            if known is not None and known != index:
                continue
            right = self._is_right(units, runs)
            if right:
                self._right_candidates[key] = index
                return units
            if right is None:
                is_undecided = True
        if not is_undecided:
            self._right_candidates.setdefault(key, _NONE_IS_RIGHT)
        return None

    def _is_right(self, units: HiddenUnits, runs: BlockRuns | None) -> bool | None:
        """Whether the block computes the same with a random half of the units at zero as without them.

        None if its tensors belong to other units or modules, too, or the user has skipped one of its layers; the same
        candidate may be right in a later block.
        """
        are_pruned = {writer.module for writer in units.writers} <= self._layer_of.keys()
        is_skipped = any(slot.module in self._skipped_by_user for slot in units.slots)
        are_tied = any((slot.module, slot.name) in self._tied for slot in units.slots)
        if not are_pruned or is_skipped or are_tied or units.lines & self._used_lines:
            return None
        if units.width < 2:
            return False

        order = torch.randperm(units.width, generator=torch.Generator().manual_seed(0))
        keep = torch.zeros(units.width, dtype=torch.bool)
        keep[order[: units.width // 2]] = True
        with units.restored():
            units.zero(~keep)
            is_same = runs is None or runs.same_after(lambda: units.take(keep), units, keep)
            return self._plan.processes.all_agree(is_same)


def _likeness(block: Module) -> tuple[object, ...]:
    """Return what blocks that compute alike have in common: parameters, and attributes such as a share of zeros."""
    shapes = [(name, parameter.shape) for name, parameter in block.named_parameters()]
    attributes = [
        (name, key, value)
        for name, module in block.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, float | bool)
    ]
    return (type(block), *shapes, *attributes)


def _has_matrix(module: Module) -> bool:
    return any(parameter.ndim > 1 for parameter in module.parameters(recurse=False))
