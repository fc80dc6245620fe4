"""Choose hidden units that can leave a model, and fill them with zeros, which `zero_units.py` takes out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from wanda_lightning.calibration.observer import Observer
from wanda_lightning.calibration.pruning_mode import pruning_mode
from wanda_lightning.common.errors import UserError
from wanda_lightning.core.allocation import Sparsities, UnitLayer
from wanda_lightning.core.patterns import Pattern, Structured
from wanda_lightning.loop.coverage import Note
from wanda_lightning.loop.make_report import left_dense, make_report
from wanda_lightning.loop.plan import DenseStatistics, Plan
from wanda_lightning.loop.run import Run
from wanda_lightning.loop.steps import (
    allocate,
    correct_batch_norm,
    observe_batch_norm,
    pruning,
    recover,
    start_recovery,
    visit_stops,
)
from wanda_lightning.models import (
    Layer,
    ReadWeight,
    SkippedMatrices,
    SkippedMatrix,
    SkipReason,
)
from wanda_lightning.report import PrunedLayer, PruningReport
from wanda_lightning.units.candidates import UnitsByReader
from wanda_lightning.units.costs import unit_costs
from wanda_lightning.units.search import find_units
from wanda_lightning.verbs.prune_weights import prune_stop, share_of_zeros


def remove_units(run: Run) -> PruningReport:
    """Set hidden units to zero: the columns of the layer that reads them, and the rows of the layers that write them.

    Only readers are observed and solved.
    """
    all_layers = run.plan.layers
    run, found = find_what_can_leave(run)
    batch_norm = observe_batch_norm(run)
    run = allocate(run, found.choose_sparsities, found.pattern_for, found.unit_columns)
    # Layers without hidden units train, too.
    recovery = start_recovery(run, all_layers)
    with pruning(run):
        observer = Observer(run.plan.observed, run.plan.processes)
        zero_units = partial(_zero_units, found, run)
        visit_stops(run, observer, partial(prune_stop, after_write=zero_units))
        run.store.finish(run)
    run = correct_batch_norm(run, batch_norm)
    run = recover(run, recovery)

    settings = {"unit_costs": dict(found.costs)} if found.costs else {}
    dense = _left_dense(run, found.units)
    return make_report(run, dense, notes=_notes(run, found), settings=settings)


def find_what_can_leave(run: Run) -> tuple[Run, FoundUnits]:
    """Return the run with a plan for the layers that read hidden units, and these units with their costs.

    One sample runs through the dense model. For each candidate, a random half of the units is set to zero, and then
    taken out: the block must compute the same. Units stay if the user has skipped a layer that writes them. A model
    without blocks is one block.
    """
    with run.clock.timed("find units"), pruning_mode(run.plan.model):
        units = _wide_enough(run.plan, find_units(run))
        run = replace(run, plan=_narrowed(run.plan, units))
        return run, FoundUnits(units, unit_costs(run, units))


@dataclass(frozen=True)
class FoundUnits:
    """The hidden units that can be taken out."""

    units: UnitsByReader  # by reader
    # The cost of one unit, by reader, for `Fisher(cost=...)`; empty if all cost the same.
    costs: Mapping[str, float] = field(default_factory=dict)

    @property
    def unit_columns(self) -> Mapping[str, int]:
        """Columns of each hidden unit, by the layer that reads it."""
        return {name: units.columns_per_unit for name, units in self.units.items()}

    def choose_sparsities(self, plan: Plan, dense: DenseStatistics, read: ReadWeight) -> Sparsities:
        """Give each layer that reads hidden units, and was measured, the fraction of them that becomes zero."""
        allocation = plan.config.allocation
        pattern = _structured(plan)
        layers = []
        for name, units in self.units.items():
            gradients = dense.gradients.get(name)
            scores = None if gradients is None else gradients.units
            # A layer that the measured batch did not reach has none.
            cost = self.costs.get(name, 0.0) if self.costs else 1.0
            is_measured = scores is not None or not allocation.reads_gradients
            if is_measured and cost:
                kind = re.sub(r"\d+", "*", name)
                layers.append(UnitLayer(name, kind, units.width, scores, cost))
        if not layers:
            return {}

        if self.costs:
            total = sum(layer.cost * layer.width for layer in layers)
            mean = total / sum(layer.width for layer in layers)
            layers = [replace(layer, cost=layer.cost / mean) for layer in layers]
        fractions = allocation.of_units(layers, plan.config.sparsity, pattern)
        return {
            layer.name: 1 - pattern.kept(layer.width, fractions[layer.name]) / layer.width
            for layer in layers
        }

    def pattern_for(self, plan: Plan, layer: Layer, sparsity: float) -> Pattern:
        """Return the pattern of a reader, which may have several columns for each unit."""
        return replace(_structured(plan), columns=self.units[layer.name].columns_per_unit)

    def cost_of(self, numbers: Mapping[str, int]) -> float:
        """Return what numbers of units cost, by reader."""
        return sum(number * self.costs.get(name, 0.0) for name, number in numbers.items())


def _zero_units(found: FoundUnits, run: Run, record: PrunedLayer) -> None:
    """Set to zero what writes the units that a layer no longer reads, and record the writers."""
    units = found.units[record.name]
    records = run.done.layers
    before = {writer.name: share_of_zeros(writer.read()) for writer in units.writers}
    zeros = units.slots[-1].zeros()
    units.zero(zeros)
    number = int(zeros.sum())
    run.done.zero_units[record.name] = number

    note = f"{number:,} of {units.width:,} hidden units removed"
    if record.note:
        note = f"{record.note}; {note}"
    records[record.name] = replace(record, note=note)
    for writer in units.writers:
        name = writer.name
        # A layer between two others reads units and writes units.
        known = records.get(name) or PrunedLayer(
            name=name,
            shape=writer.shape,
            target=record.target,
            sparsity=0.0,
            tokens=record.tokens,
            before=before[name],
            block=run.plan.inventory.blocks[name],
        )
        records[name] = replace(known, sparsity=share_of_zeros(writer.read()))


def _left_dense(run: Run, units: UnitsByReader) -> SkippedMatrices:
    """Return the layers that stayed dense, with what writes the hidden units that they read."""
    readers = left_dense(run)
    dense = dict(readers)
    for reader, skipped in readers.items():
        for writer in units[reader].writers:
            if writer.name not in run.done.layers:
                copy = replace(skipped, name=writer.name, shape=writer.stored_shape)
                dense.setdefault(writer.name, copy)
    return dense


def _notes(run: Run, found: FoundUnits) -> Iterator[Note]:
    """Yield how many hidden units are zero, and what share of the cost they have."""
    config = run.plan.config
    if not config.sparsity:
        return
    number = sum(run.done.zero_units.values())
    widths = {name: units.width for name, units in found.units.items()}
    width = sum(widths.values())
    if not number:
        yield Note(
            f"none of {width:,} hidden units is removed, because {config.shown('sparsity')} rounds to no "
            "unit of any layer: use a smaller multiple_of, or remove more"
        )
        return

    text = f"{number:,} of {width:,} hidden units removed"
    if found.costs:
        share = found.cost_of(run.done.zero_units) / found.cost_of(widths)
        text += f", {share:.1%} of the {config.allocation.cost} of all"
    yield Note(text, is_warning=False)


def _structured(plan: Plan) -> Structured:
    pattern = plan.config.pattern
    assert isinstance(pattern, Structured)
    return pattern


def _wide_enough(plan: Plan, units: UnitsByReader) -> UnitsByReader:
    """Return the units of layers that have more than the pattern keeps at least; refuse a model without any."""
    pattern = _structured(plan)
    name = plan.config.shown("pattern")
    if not units:
        raise UserError(
            f"{name} finds no hidden units in the model: in no block does one layer read what others write, with every "
            "unit apart from the rest. Let skip= and only= leave out no layer of an MLP, or make zeros with prune."
        )
    widths = {reader: found.width for reader, found in units.items()}
    pattern.check_widths(widths, plan.config.sparsity, name)
    return {reader: found for reader, found in units.items() if found.width > pattern.multiple_of}


def _narrowed(plan: Plan, units: UnitsByReader) -> Plan:
    """Return a plan that observes and prunes the readers only; layers that neither read nor write units stay dense."""
    detail = "no hidden units that could be taken out were found at its inputs or outputs"
    used = {writer.name for found in units.values() for writer in found.writers} | units.keys()
    skipped = [
        SkippedMatrix(layer.name, layer.stored_shape, SkipReason.UNCOUPLED, detail)
        for layer in plan.layers
        if layer.name not in used
    ]
    stops = []
    for stop in plan.stops:
        readers = tuple(layer for layer in stop.layers if layer.name in units)
        if readers:
            stops.append(replace(stop, layers=readers))
    inventory = replace(
        plan.inventory, stops=tuple(stops), skipped=(*plan.inventory.skipped, *skipped)
    )
    return replace(plan, inventory=inventory)
