"""Find the hidden units of each block that can be taken out: it computes the same with units at zero as without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from contextlib import closing
from dataclasses import replace

import torch
from torch import nn

from wanda_lightning.calibration.block_runs import BlockRuns
from wanda_lightning.calibration.lockstep import Call
from wanda_lightning.common.errors import UserError
from wanda_lightning.core.patterns import Structured
from wanda_lightning.engine.plan import Plan, refuse_rounding
from wanda_lightning.engine.run import Run, dense_blocks
from wanda_lightning.models import (
    Layer,
    RemovableUnits,
    SkippedMatrix,
    SkipReason,
    Stop,
    removable_units,
    tied_tensors,
)
from wanda_lightning.models.module_names import named_modules

_DETAIL = "no hidden units that could be taken out were found at its inputs or outputs"

_UNSEEN = "the calibration sample that shows which hidden units can be taken out does not call it"


def couple(run: Run) -> Plan:
    """Find the hidden units that can be taken out, and return the plan that leaves all other layers dense.

    One sample runs through the dense model. For each candidate, a random half of the units is set to zero, and then
    taken out: the block must compute the same. Units stay if the user has skipped a layer that writes them. A model
    without blocks is one block.
    """
    plan = run.plan
    search, again, places = _Search(plan), set[str](), plan.block_stops or (_one_block(plan),)
    with closing(dense_blocks(run, places, 1, "Finding hidden units", again)) as blocks:
        for block, calls in blocks:
            search(block, calls)
    left_out = {layer.name for block in places if block.name in again for layer in block.layers}
    found = {name: each for name, each in search.found.items() if name not in left_out}
    return _narrowed(plan, _wide_enough(plan, found), search.reached)


def _one_block(plan: Plan) -> Stop:
    """Return the smallest module with a forward that contains all layers."""
    modules, name = named_modules(plan.model), plan.layers[0].name.rpartition(".")[0]

    def is_around(name: str) -> bool:
        inside = all(layer.name.startswith(f"{name}." if name else "") for layer in plan.layers)
        return inside and type(modules[name]).forward is not nn.Module.forward  # a ModuleList has none

    while name and not is_around(name):
        name = name.rpartition(".")[0]
    return Stop(name, modules[name], plan.layers)


def _wide_enough(plan: Plan, found: Mapping[str, RemovableUnits]) -> dict[str, RemovableUnits]:
    """Return the units of layers that have more than the pattern keeps at least; refuse a model without any."""
    pattern = plan.config.pattern
    assert isinstance(pattern, Structured)
    if not found:
        raise UserError(
            f"{plan.config.shown('pattern')} finds no hidden units in the model: in no block does one layer read what "
            "others write, with every unit apart from the rest. Merge adapters first, if there are any, and let skip= "
            "and only= leave out no layer of an MLP; or use pattern='unstructured' or '2:4'."
        )
    refuse_rounding(plan.config, {name: units.width for name, units in found.items()})
    return {name: units for name, units in found.items() if units.width > pattern.multiple_of}


class _Search:
    """Finds the units of one block after the other."""

    def __init__(self, plan: Plan) -> None:
        self.found: dict[str, RemovableUnits] = {}  # by reader
        self.reached: set[str] = set()  # layers that the sample reached
        self._plan, self._modules, self._tied = plan, named_modules(plan.model), tied_tensors(plan.model)
        self._own = {layer.module: layer for layer in plan.layers}
        self._kept = {self._modules.get(m.name) for m in plan.inventory.skipped_for(SkipReason.USER)}
        self._taken: set[tuple[nn.Module, str, int]] = set()  # a matrix has one set of rows and one of columns
        # The candidate that fits readers with the same name in blocks of the same kind; -1 if none does.
        self._known: dict[tuple[object, ...], int] = {}

    def __call__(self, block: Stop, calls: Sequence[Call]) -> None:
        """Find the units that layers of this block read."""
        assert block.module is not None
        runs = BlockRuns(block.module, calls)
        for call in runs.recording():
            call.run(on_copies=True)
        with self._plan.processes.fail_together():
            for layer in block.layers:
                if units := self._fitting(layer, block, runs):
                    self.found[layer.name] = units
                    self._taken |= units.lines

    def _fitting(self, reader: Layer, block: Stop, runs: BlockRuns) -> RemovableUnits | None:
        """Return the units that a layer reads, if they can be taken out."""
        assert block.module is not None
        if reader.expert is not None or reader.group is not None:
            return None
        parent = self._modules[reader.name.rpartition(".")[0]]
        key = _likeness(block.module), reader.name.removeprefix(block.name)
        if not self._plan.processes.all_agree(runs.is_empty or runs.reaches(reader.module)):
            return None
        self.reached.add(reader.name)
        if not self._plan.processes.all_agree(runs.is_empty or runs.reads_alone(reader.module)):
            return None
        all_free = True
        for index, found in enumerate(removable_units(reader, parent, block.module)):
            if self._known.get(key, index) != index:
                continue
            if not self._is_free(found):
                all_free = False
            elif self._is_right(found, runs):
                self._known[key] = index
                return replace(found, writers=tuple(self._own[writer.module] for writer in found.writers))
        if all_free:  # otherwise, it may fit in the next block
            self._known.setdefault(key, -1)
        return None

    def _is_free(self, units: RemovableUnits) -> bool:
        """Whether its tensors belong to no other units or modules, and all of its layers may be pruned."""
        tied = any((slot.module, slot.name) in self._tied for slot in units.slots)
        own = all(writer.module in self._own for writer in units.writers)
        kept = any(slot.module in self._kept for slot in units.slots)
        return own and not tied and not kept and not units.lines & self._taken

    def _is_right(self, units: RemovableUnits, runs: BlockRuns) -> bool:
        """Whether the block computes the same with a random half of the units at zero as without them."""
        if units.width < 2:
            return False
        keep = torch.zeros(units.width, dtype=torch.bool)
        keep[torch.randperm(units.width, generator=torch.Generator().manual_seed(0))[: units.width // 2]] = True
        with units.restored():
            units.zero(~keep)
            same = runs.is_empty or runs.same_after(lambda: units.take(keep), (units, keep))
            return self._plan.processes.all_agree(same)


def _likeness(block: nn.Module) -> tuple[object, ...]:
    """Return what blocks that compute alike have in common: parameters, and attributes such as a share of zeros."""
    attributes = [
        (name, key, value)
        for name, module in block.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, float | bool)
    ]
    return type(block), *((name, parameter.shape) for name, parameter in block.named_parameters()), *attributes


def _narrowed(plan: Plan, coupled: Mapping[str, RemovableUnits], reached: Set[str]) -> Plan:
    """Return a plan that observes and prunes the readers only; layers that neither read nor write units stay dense."""
    inventory = plan.inventory
    written = {writer.name for units in coupled.values() for writer in units.writers}
    skipped = tuple(
        SkippedMatrix(
            layer.name, layer.stored_shape, SkipReason.UNCOUPLED, _DETAIL if layer.name in reached else _UNSEEN
        )
        for layer in inventory.layers
        if layer.name not in coupled and layer.name not in written
    )
    narrow = (replace(stop, layers=tuple(x for x in stop.layers if x.name in coupled)) for stop in inventory.stops)
    stops = tuple(stop for stop in narrow if stop.layers)
    inventory = replace(inventory, stops=stops, skipped=(*inventory.skipped, *skipped))
    return replace(plan, inventory=inventory, coupled=coupled)
