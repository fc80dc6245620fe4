"""Permute hidden units before pruning, so that groups of N:M keep larger scores; the dense outputs stay the same."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial

import torch
from torch import nn

from wanda_lightning.calibration.block_runs import BlockRuns
from wanda_lightning.calibration.error_notes import noting
from wanda_lightning.calibration.lockstep import Call
from wanda_lightning.calibration.mode import pruning_mode
from wanda_lightning.calibration.observer import Observer
from wanda_lightning.core.criteria import Wanda
from wanda_lightning.core.permutation import kept_score
from wanda_lightning.core.statistics import InputStatistics
from wanda_lightning.core.types import Orders, Score
from wanda_lightning.engine.plan import Plan
from wanda_lightning.engine.run import Run, dense_blocks
from wanda_lightning.models import HiddenUnits, Layer, Stop, hidden_units, is_plain, removable_units, tied_tensors
from wanda_lightning.models.module_names import named_modules
from wanda_lightning.report import Permuted

_SAMPLES = 8  # over all processes; as many as for the gradients of `best`

Reordering = tuple[HiddenUnits, Orders]


def permute(run: Run) -> Permuted:
    """Permute the hidden units inside each block, in place, and return what was permuted.

    Eight samples run through the dense model. Wanda's scores of these samples give the order, and runs of the block
    show what can be permuted at all: the units of each candidate are permuted at random, and then the reader must
    receive the permuted values, while everything else in the block stays the same. After all units of the block are
    permuted, its results must be the same for all samples; otherwise the units are put back in their original order.
    """
    plan, store = run.plan, run.store
    stops = plan.block_stops
    if not stops:
        return Permuted(why_not="no layer to prune lies in a block")
    search, observer, again = _Search(plan), Observer(Wanda.needs, plan.processes), set[str]()
    blocks = dense_blocks(run, stops, _SAMPLES, "Permuting", again)
    with pruning_mode(plan.model, search.moved), closing(blocks), noting(search.state):
        for block, calls in blocks:
            search(block, calls, observer)
        for name in [stop.name for stop in stops]:
            if name in again:
                store.undo(partial(search.put_back, name))
                search.forget(name)
            else:
                store.repeat(name, partial(_permute_all, search.done.get(name, ())))
    return Permuted(search.kept, tuple(search.back))


class _Search:
    """Permutes the hidden units of one block after the other."""

    def __init__(self, plan: Plan) -> None:
        self.kept = dict[str, tuple[float, float]]()  # see `Permuted`
        self.back = list[str]()  # names of blocks whose units have their own order again
        self.done: dict[str, list[Reordering]] = {}  # by block
        self.moved = set[nn.Module]()  # whose tensors have another order, perhaps buffers among them
        self._plan, self._modules, self._tied = plan, named_modules(plan.model), tied_tensors(plan.model)
        # The candidate that fits readers with the same name and shape in blocks of the same class; -1 if none does.
        self._known: dict[tuple[object, ...], int] = {}

    def __call__(self, block: Stop, calls: Sequence[Call], observer: Observer) -> None:
        """Permute the hidden units that layers of this block read."""
        assert block.module is not None
        runs = BlockRuns(block.module, calls)
        inputs = observer(block, runs.recording()).inputs
        with self._plan.processes.fail_together():
            chosen = list(self._find(block, runs, inputs))
            self.moved |= {slot.module for hidden, _ in chosen for slot in hidden.slots}
            _permute_all(chosen)
            self.done[block.name] = chosen
            if not self._plan.processes.all_agree(runs.same_results()):
                self.put_back(block.name)

    def _find(self, block: Stop, runs: BlockRuns, inputs: Mapping[str, InputStatistics]) -> Iterator[Reordering]:
        """Yield the hidden units of a block that can be permuted, with another order for them."""
        for hidden in [hidden for layer in block.layers for hidden in self._fitting(layer, block, runs)]:
            scores = Wanda()(hidden.reader.read(), inputs[hidden.reader.name])
            orders = self._choose(hidden, scores)
            both = torch.arange(scores.shape[1]), hidden.source(orders)
            if not torch.equal(*both):
                before, after = (kept_score(scores, each, self._plan.config.pattern) for each in both)
                self.kept[hidden.reader.name] = before, after
                yield hidden, orders

    def put_back(self, name: str) -> None:
        """Put the hidden units of a block, which is in memory, back into their order, and report it."""
        back = [(hidden, orders.argsort(dim=1)) for hidden, orders in reversed(self.done.get(name, []))]
        _permute_all(back)
        self.forget(name)

    def forget(self, name: str) -> None:
        """Report that the hidden units of a block are in their own order."""
        chosen = self.done.pop(name, [])
        for hidden, _ in chosen:
            del self.kept[hidden.reader.name]
        if chosen:
            self.back.append(name)

    def state(self) -> str:
        """Say, for an error, that the dense model is permuted; return nothing if it is not."""
        permuted = "Hidden units of the model are permuted already. It computes the same as before."
        return permuted if any(self.done.values()) else ""

    def _fitting(self, reader: Layer, block: Stop, runs: BlockRuns) -> Iterator[HiddenUnits]:
        """Yield the hidden units that a layer reads, if they can be permuted."""
        assert block.module is not None
        alone = is_plain(reader) and (runs.is_empty or runs.reads_alone(reader.module))
        if not self._plan.processes.all_agree(alone):
            return
        parent = self._modules[reader.name.rpartition(".")[0]]
        key = type(block.module), reader.name.removeprefix(block.name), reader.shape
        for index, hidden in enumerate(_candidates(reader, parent, block.module)):
            tied = any((slot.module, slot.name) in self._tied for slot in hidden.slots)
            fits = hidden.columns.shape[2] % self._plan.config.pattern.group_size == 0  # groups lie within heads
            if self._known.get(key, index) == index and not tied and fits and self._is_right(hidden, runs):
                self._known[key] = index
                yield hidden
                return
        self._known.setdefault(key, -1)

    def _is_right(self, hidden: HiddenUnits, runs: BlockRuns) -> bool:
        """Whether a random order of the units permutes what the reader receives, and changes nothing else."""
        generator = torch.Generator().manual_seed(0)
        heads, _, size = hidden.columns.shape
        orders = torch.stack([torch.randperm(size, generator=generator) for _ in range(heads)])
        hidden.permute(orders)
        try:
            same = runs.is_empty or runs.is_permuted(hidden.reader, hidden.source(orders), hidden.inner)
        finally:
            hidden.permute(orders.argsort(dim=1))
        return self._plan.processes.all_agree(same)

    def _choose(self, hidden: HiddenUnits, scores: Score) -> Orders:
        """Return an order of the units of each head."""
        config = self._plan.config
        by_head = scores[:, hidden.columns].permute(1, 0, 2, 3).flatten(1, 2)  # copies of a unit are further rows
        orders = torch.stack([config.permutation(each, config.pattern).cpu() for each in by_head])
        # One process decides: sums that differ in the last digit could give another order.
        return self._plan.processes.broadcast(orders, 0)


def _candidates(reader: Layer, parent: nn.Module, block: nn.Module) -> Iterator[HiddenUnits]:
    """Yield candidates for the hidden units that a plain layer reads, at last with depthwise layers in between."""
    yield from hidden_units(reader, parent, block)
    for units in removable_units(reader, parent, block):
        yield HiddenUnits(reader, units.slots, units.inner)


def _permute_all(reorderings: Iterable[Reordering]) -> None:
    for hidden, orders in reorderings:
        hidden.permute(orders)
