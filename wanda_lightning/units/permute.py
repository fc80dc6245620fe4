"""Permute hidden units inside each block, so that N:M groups keep larger scores; the model computes the same."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import Module

from wanda_lightning.calibration.lockstep import Visit
from wanda_lightning.calibration.observer import Observer
from wanda_lightning.calibration.pruning_mode import pruning_mode
from wanda_lightning.common.aliases import Action
from wanda_lightning.core.criteria import Wanda
from wanda_lightning.core.permutation import kept_score
from wanda_lightning.core.statistics import InputStatistics
from wanda_lightning.core.types import Orders
from wanda_lightning.models import Layer, Stop, is_pointwise
from wanda_lightning.planning.plan import Plan
from wanda_lightning.planning.run import Run
from wanda_lightning.report import Permuted
from wanda_lightning.units.block_runs import BlockRuns
from wanda_lightning.units.candidates import HiddenUnits, hidden_units, removable_units
from wanda_lightning.units.search import UnitSearch, visit_dense_blocks

_SAMPLES = 8  # over all processes; as many as for the gradients of `best`


def permute(run: Run) -> Permuted:
    """Permute the hidden units inside each block, in place, and return what was permuted.

    Eight samples run through the dense model. Wanda's scores of these samples give the order, and runs of the block
    show what can be permuted at all: the units of each candidate are permuted at random, and then the reader must
    receive the permuted values, while everything else in the block stays the same. After all units of the block are
    permuted, its results must be the same for all samples; otherwise the units are put back in their original order.
    """
    plan = run.plan
    if not plan.block_stops:
        return Permuted(why_not="no layer to prune lies in a block")

    search = _PermutationSearch(plan)
    with pruning_mode(plan.model, search.permuted_modules):
        called_again = visit_dense_blocks(
            run, plan.block_stops, _SAMPLES, "Permuting", search.permute_block
        )
        for stop in plan.block_stops:
            if stop.name in called_again:
                run.store.undo_change(search.withdraw(stop.name))
            else:
                repeat = partial(_apply, search.reorderings.get(stop.name, ()))
                run.store.change_when_loaded(stop.name, repeat)
    return Permuted(search.kept_scores, tuple(search.put_back_blocks))


@dataclass(frozen=True)
class _Reordering:
    """Another order for hidden units, (heads, units)."""

    units: HiddenUnits
    orders: Orders


def _apply(reorderings: Iterable[_Reordering]) -> None:
    for reordering in reorderings:
        reordering.units.permute(reordering.orders)


def _undo(reorderings: Sequence[_Reordering]) -> None:
    for reordering in reversed(reorderings):
        reordering.units.permute(reordering.orders.argsort(dim=1))


class _PermutationSearch(UnitSearch):
    """Permutes the hidden units of one block after the other."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan, likeness=type)
        # By reader: the scores that are kept before and after.
        self.kept_scores: dict[str, tuple[float, float]] = {}
        self.put_back_blocks: list[str] = []  # whose units have their own order again
        self.reorderings: dict[str, list[_Reordering]] = {}  # by block
        # Their tensors have another order, perhaps buffers among them.
        self.permuted_modules: set[Module] = set()
        self._observer = Observer(Wanda.needs, plan.processes)

    def permute_block(self, visit: Visit) -> None:
        """Permute the hidden units that layers of this block read."""
        block = visit.stop
        assert block.module is not None
        runs = BlockRuns(block.module, visit.calls)
        inputs = self._observer(block, runs.recording()).inputs
        with self._plan.processes.fail_together():
            reorderings = list(self._find(block, runs, inputs))
            for reordering in reorderings:
                self.permuted_modules |= {slot.module for slot in reordering.units.slots}
            _apply(reorderings)
            self.reorderings[block.name] = reorderings
            if not self._plan.processes.all_agree(runs.same_results()):
                self.withdraw(block.name)()

    def _find(
        self, block: Stop, runs: BlockRuns, inputs: Mapping[str, InputStatistics]
    ) -> Iterator[_Reordering]:
        """Yield the hidden units of a block that can be permuted, with another order for them."""
        # All are found before the first one is permuted.
        readable = []
        for layer in filter(is_pointwise, block.layers):
            units = self.first_right(layer, block, runs, _candidates, self._is_right)
            if units is not None:
                readable.append(units)

        pattern = self._plan.config.pattern
        for units in readable:
            scores = Wanda()(units.reader.read(), inputs[units.reader.name])
            # Copies of a unit, such as values that several query heads read, are further rows.
            scores_by_head = scores[:, units.columns].permute(1, 0, 2, 3).flatten(1, 2)
            permutation = self._plan.config.permutation
            orders = torch.stack([permutation(head, pattern).cpu() for head in scores_by_head])
            # One process decides: sums that differ in the last digit could give another order.
            orders = self._plan.processes.broadcast(orders, 0)

            columns = torch.arange(scores.shape[1])
            permuted_columns = units.source(orders)
            if not torch.equal(columns, permuted_columns):
                self.kept_scores[units.reader.name] = (
                    kept_score(scores, columns, pattern),
                    kept_score(scores, permuted_columns, pattern),
                )
                yield _Reordering(units, orders)

    def withdraw(self, block: str) -> Action:
        """Record that the units of a block go back into their old order, and return the function that puts them back.

        The caller may drop it: weights on disk are read again instead.
        """
        reorderings = self.reorderings.pop(block, [])
        for reordering in reorderings:
            del self.kept_scores[reordering.units.reader.name]
        if reorderings:
            self.put_back_blocks.append(block)
        return partial(_undo, reorderings)

    def _is_right(self, units: HiddenUnits, runs: BlockRuns) -> bool:
        """Whether a random order of the units permutes what the reader receives, and changes nothing else."""
        heads, _, size = units.columns.shape
        groups_fit_heads = size % self._plan.config.pattern.group_size == 0
        if self.is_tied(units) or not groups_fit_heads:
            return False

        generator = torch.Generator().manual_seed(0)
        orders = torch.stack([torch.randperm(size, generator=generator) for _ in range(heads)])
        units.permute(orders)
        try:
            is_permuted = runs.is_empty or runs.is_permuted(units, orders)
        finally:
            units.permute(orders.argsort(dim=1))
        return self._plan.processes.all_agree(is_permuted)


def _candidates(reader: Layer, parent: Module, block: Module) -> Iterator[HiddenUnits]:
    """Yield candidates for the hidden units that a plain layer reads, at last with depthwise layers in between."""
    yield from hidden_units(reader, parent, block)
    yield from removable_units(reader, parent, block)
