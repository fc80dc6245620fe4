"""Find hidden units by running blocks: units that can be permuted for N:M, and units that can be taken out.

Candidates come from shapes (`units/candidates.py`). The units of each are changed, and the block runs again: what it
computes shows which candidate is right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import takewhile
from typing import TypeVar

import torch
from torch import nn

from wanda_lightning.calibration.lockstep import Call
from wanda_lightning.calibration.observer import Observer
from wanda_lightning.calibration.pruning_mode import pruning_mode
from wanda_lightning.common.errors import UserError
from wanda_lightning.core.criteria import Wanda
from wanda_lightning.core.patterns import Structured
from wanda_lightning.core.permutation import kept_score
from wanda_lightning.core.statistics import InputStatistics
from wanda_lightning.core.types import Orders
from wanda_lightning.models import Layer, SkippedMatrix, SkipReason, Stop, is_plain, tied_tensors
from wanda_lightning.models.layers import named_modules
from wanda_lightning.planning.plan import Plan, refuse_rounding
from wanda_lightning.planning.run import Run, dense_blocks
from wanda_lightning.report import Permuted
from wanda_lightning.units.block_runs import BlockRuns
from wanda_lightning.units.candidates import (
    HiddenUnits,
    RemovableUnits,
    hidden_units,
    removable_units,
)

_SAMPLES = 8  # over all processes; as many as for the gradients of `best`

_Units = TypeVar("_Units", HiddenUnits, RemovableUnits)

Reordering = tuple[HiddenUnits, Orders]


def permute(run: Run) -> Permuted:
    """Permute the hidden units inside each block, in place, and return what was permuted.

    Eight samples run through the dense model. Wanda's scores of these samples give the order, and runs of the block
    show what can be permuted at all: the units of each candidate are permuted at random, and then the reader must
    receive the permuted values, while everything else in the block stays the same. After all units of the block are
    permuted, its results must be the same for all samples; otherwise the units are put back in their original order.
    """
    plan, stops = run.plan, run.plan.block_stops
    if not stops:
        return Permuted(why_not="no layer to prune lies in a block")
    search = _Permuting(plan)
    again = set[str]()
    blocks = dense_blocks(run, stops, _SAMPLES, "Permuting", again)
    with pruning_mode(plan.model, search.moved), closing(blocks):
        for block, calls in blocks:
            search(block, calls)
        for stop in stops:
            if stop.name in again:
                search.put_back(stop.name, run.store.undo)
            else:
                run.store.repeat(stop.name, partial(_permute_all, search.done.get(stop.name, ())))
    return Permuted(search.kept, tuple(search.back))


def couple(run: Run) -> Plan:
    """Find the hidden units that can be taken out, and return the plan that leaves all other layers dense.

    One sample runs through the dense model. For each candidate, a random half of the units is set to zero, and then
    taken out: the block must compute the same. Units stay if the user has skipped a layer that writes them. A model
    without blocks is one block.
    """
    plan = run.plan
    search = _Removing(plan)
    again = set[str]()
    places = plan.block_stops or (_one_block(plan),)
    with closing(dense_blocks(run, places, 1, "Finding hidden units", again)) as blocks:
        for block, calls in blocks:
            search(block, calls)
    left_out = {layer.name for block in places if block.name in again for layer in block.layers}
    found = {name: units for name, units in search.found.items() if name not in left_out}
    return _narrowed(plan, _wide_enough(plan, found))


class _Search:
    """Finds the hidden units of one block after the other."""

    def __init__(self, plan: Plan, likeness: Callable[[nn.Module], object]) -> None:
        self._plan = plan
        self._likeness = likeness
        self._modules = named_modules(plan.model)
        self._tied = tied_tensors(plan.model)
        # The candidate that is right for readers with the same name and shape in blocks alike; -1 if none is.
        self._known: dict[tuple[object, ...], int] = {}

    def _first(
        self,
        reader: Layer,
        block: Stop,
        runs: BlockRuns,
        candidates: Callable[[Layer, nn.Module, nn.Module], Iterator[_Units]],
        is_right: Callable[[_Units, BlockRuns], bool | None],
    ) -> _Units | None:
        """Return the hidden units of a reader: the first candidate that is right, if any.

        For a candidate that may be right in a later block, `is_right` returns None.
        """
        assert block.module is not None
        if not self._plan.processes.all_agree(runs.is_empty or runs.reads_alone(reader.module)):
            return None
        parent = self._modules[reader.name.rpartition(".")[0]]
        key = (self._likeness(block.module), reader.name.removeprefix(block.name), reader.shape)
        undecided = False
        for index, units in enumerate(candidates(reader, parent, block.module)):
            right = self._known.get(key, index) == index and is_right(units, runs)
            if right:
                self._known[key] = index
                return units
            undecided |= right is None
        if not undecided:
            self._known.setdefault(key, -1)
        return None

    def _is_tied(self, units: HiddenUnits | RemovableUnits) -> bool:
        return any((slot.module, slot.name) in self._tied for slot in units.slots)


class _Permuting(_Search):
    """Permutes the hidden units of one block after the other."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan, type)
        self.kept = dict[str, tuple[float, float]]()  # see `Permuted`
        self.back = list[str]()  # names of blocks whose units have their own order again
        self.done: dict[str, list[Reordering]] = {}  # by block
        self.moved = set[
            nn.Module
        ]()  # whose tensors have another order, perhaps buffers among them
        self._observer = Observer(Wanda.needs, plan.processes)

    def __call__(self, block: Stop, calls: Sequence[Call]) -> None:
        """Permute the hidden units that layers of this block read."""
        assert block.module is not None
        runs = BlockRuns(block.module, calls)
        inputs = self._observer(block, runs.recording()).inputs
        with self._plan.processes.fail_together():
            chosen = list(self._find(block, runs, inputs))
            self.moved |= {slot.module for hidden, _ in chosen for slot in hidden.slots}
            _permute_all(chosen)
            self.done[block.name] = chosen
            if not self._plan.processes.all_agree(runs.same_results()):
                self.put_back(block.name)

    def _find(
        self, block: Stop, runs: BlockRuns, inputs: Mapping[str, InputStatistics]
    ) -> Iterator[Reordering]:
        """Yield the hidden units of a block that can be permuted, with another order for them."""
        config = self._plan.config
        plain = filter(is_plain, block.layers)
        found = [self._first(layer, block, runs, _candidates, self._is_right) for layer in plain]
        for hidden in filter(None, found):
            scores = Wanda()(hidden.reader.read(), inputs[hidden.reader.name])
            # Copies of a unit are further rows.
            by_head = scores[:, hidden.columns].permute(1, 0, 2, 3).flatten(1, 2)
            orders = torch.stack(
                [config.permutation(each, config.pattern).cpu() for each in by_head]
            )
            # One process decides: sums that differ in the last digit could give another order.
            orders = self._plan.processes.broadcast(orders, 0)
            both = torch.arange(scores.shape[1]), hidden.source(orders)
            if not torch.equal(*both):
                before, after = (kept_score(scores, each, config.pattern) for each in both)
                self.kept[hidden.reader.name] = before, after
                yield hidden, orders

    def put_back(
        self, name: str, undo: Callable[[Callable[[], None]], None] = lambda change: change()
    ) -> None:
        """Put the hidden units of a block back into their order by `undo`, and report it."""
        chosen = self.done.pop(name, [])
        undo(
            partial(
                _permute_all,
                [(hidden, orders.argsort(dim=1)) for hidden, orders in reversed(chosen)],
            )
        )
        for hidden, _ in chosen:
            del self.kept[hidden.reader.name]
        if chosen:
            self.back.append(name)

    def _is_right(self, hidden: HiddenUnits, runs: BlockRuns) -> bool:
        """Whether a random order of the units permutes what the reader receives, and changes nothing else."""
        heads, _, size = hidden.columns.shape
        # Groups lie within heads.
        if self._is_tied(hidden) or size % self._plan.config.pattern.group_size:
            return False
        generator = torch.Generator().manual_seed(0)
        orders = torch.stack([torch.randperm(size, generator=generator) for _ in range(heads)])
        hidden.permute(orders)
        try:
            same = runs.is_empty or runs.is_permuted(
                hidden.reader, hidden.source(orders), hidden.inner
            )
        finally:
            hidden.permute(orders.argsort(dim=1))
        return self._plan.processes.all_agree(same)


def _candidates(reader: Layer, parent: nn.Module, block: nn.Module) -> Iterator[HiddenUnits]:
    """Yield candidates for the hidden units that a plain layer reads, at last with depthwise layers in between."""
    yield from hidden_units(reader, parent, block)
    for units in removable_units(reader, parent, block):
        yield HiddenUnits(reader, units.slots, units.inner)


def _permute_all(reorderings: Iterable[Reordering]) -> None:
    for hidden, orders in reorderings:
        hidden.permute(orders)


class _Removing(_Search):
    """Finds the units of one block after the other that can be taken out."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan, _likeness)
        self.found: dict[str, RemovableUnits] = {}  # by reader
        self._own = {layer.module: layer for layer in plan.layers}
        self._kept = {
            self._modules.get(m.name) for m in plan.inventory.skipped_for(SkipReason.USER)
        }
        # A matrix has one set of rows and one of columns.
        self._taken: set[tuple[nn.Module, str, int]] = set()

    def __call__(self, block: Stop, calls: Sequence[Call]) -> None:
        """Find the units that layers of this block read."""
        assert block.module is not None
        runs = BlockRuns(block.module, calls)
        with self._plan.processes.fail_together():
            for call in runs.recording():
                call.run(on_copies=True)
            for layer in block.layers:
                if layer.expert is not None or layer.group is not None:
                    continue
                if units := self._first(layer, block, runs, removable_units, self._is_right):
                    writers = tuple(self._own[writer.module] for writer in units.writers)
                    self.found[layer.name] = replace(units, writers=writers)
                    self._taken |= units.lines

    def _is_right(self, units: RemovableUnits, runs: BlockRuns) -> bool | None:
        """Whether the block computes the same with a random half of the units at zero as without them.

        None if its tensors belong to other units or modules, too, or the user has skipped one of its layers.
        """
        own = all(writer.module in self._own for writer in units.writers)
        kept = any(slot.module in self._kept for slot in units.slots)
        if not own or kept or self._is_tied(units) or units.lines & self._taken:
            return None
        if units.width < 2:
            return False
        keep = torch.zeros(units.width, dtype=torch.bool)
        keep[
            torch.randperm(units.width, generator=torch.Generator().manual_seed(0))[
                : units.width // 2
            ]
        ] = True
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
    return (
        type(block),
        *((name, parameter.shape) for name, parameter in block.named_parameters()),
        *attributes,
    )


def _one_block(plan: Plan) -> Stop:
    """Return the smallest module with a forward that contains all layers."""
    modules = named_modules(plan.model)
    levels = zip(*(x.name.split(".")[:-1] for x in plan.layers), strict=False)
    parts = [names[0] for names in takewhile(lambda names: len({*names}) == 1, levels)]
    # A ModuleList has none.
    while parts and type(modules[".".join(parts)]).forward is nn.Module.forward:
        parts.pop()
    return Stop(".".join(parts), modules[".".join(parts)], plan.layers)


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


def _narrowed(plan: Plan, coupled: Mapping[str, RemovableUnits]) -> Plan:
    """Return a plan that observes and prunes the readers only; layers that neither read nor write units stay dense."""
    inventory = plan.inventory
    detail = "no hidden units that could be taken out were found at its inputs or outputs"
    written = {writer.name for units in coupled.values() for writer in units.writers}
    skipped = tuple(
        SkippedMatrix(layer.name, layer.stored_shape, SkipReason.UNCOUPLED, detail)
        for layer in inventory.layers
        if layer.name not in coupled and layer.name not in written
    )
    narrow = (
        replace(stop, layers=tuple(x for x in stop.layers if x.name in coupled))
        for stop in inventory.stops
    )
    stops = tuple(stop for stop in narrow if stop.layers)
    inventory = replace(inventory, stops=stops, skipped=(*inventory.skipped, *skipped))
    return replace(plan, inventory=inventory, coupled=coupled)
