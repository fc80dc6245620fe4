"""Permute hidden units before pruning, so that groups of N:M keep larger scores. The model computes the same."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from wanda_lightning.calibration.batch_thread import Call
from wanda_lightning.calibration.batches import CalibrationBatches
from wanda_lightning.calibration.cloning import clone_arguments, tensors_within
from wanda_lightning.calibration.lockstep import lockstep
from wanda_lightning.calibration.observer import Observer
from wanda_lightning.core.criteria import Wanda
from wanda_lightning.core.permutation import kept_score
from wanda_lightning.core.statistics import InputStatistics
from wanda_lightning.core.types import Orders
from wanda_lightning.models import HiddenUnits, Layer, Unit, hidden_units, is_plain
from wanda_lightning.models.module_names import named_modules
from wanda_lightning.parallel import Processes, is_sharded
from wanda_lightning.plan import Plan
from wanda_lightning.progress import ProgressBar
from wanda_lightning.report import Permuted
from wanda_lightning.weight_store import WeightStore

_SAMPLES = 8  # over all processes; as many as for the gradients of `best`


def permute(plan: Plan, data: CalibrationBatches, store: WeightStore, progress: bool) -> Permuted:
    """Permute the hidden units inside of each block, in place, with Wanda's scores of the dense model.

    Which units can be permuted is found by measuring: they are permuted at random where they seem to be written, and
    the reader must receive the same values in this order. At the end the output of the block must be the same.
    """
    if is_sharded(plan.model):
        return Permuted(why_not="the model is sharded")
    names = {module: name for name, module in named_modules(plan.model).items()}
    units = [
        Unit(names[block], block, tuple(layer for layer in plan.layers if layer.name.startswith(f"{names[block]}.")))
        for block in plan.blocks
    ]
    if not units:
        return Permuted(why_not="the model has no blocks")
    processes = plan.processes
    with processes.fail_together():
        samples = [sample for sample, _ in data.first(-(-_SAMPLES // processes.world_size), sys.maxsize)[0]]
    observer = Observer(Wanda.needs, [sample.masks for sample in samples], processes=processes)
    search = _Search(plan, observer, store)
    forwards = [sample.predict for sample in samples]
    with ProgressBar("Permuting", len(units), progress) as bar, store.dense():
        for stop in lockstep(forwards, plan.blocks, processes, [unit.name for unit in units]):
            unit = units[stop.unit]
            bar.show(unit.name)
            store.hold(unit.name)
            search(unit, stop.calls)
            bar.advance()
    return search.permuted


class _Search:
    """Permutes the hidden units of one block after the other."""

    def __init__(self, plan: Plan, observer: Observer, store: WeightStore) -> None:
        self.permuted = Permuted()
        self._plan, self._observer, self._store = plan, observer, store
        self._modules = named_modules(plan.model)
        self._tied = _tied(plan.model)
        self._known: dict[tuple[type, str], tuple[int, ...]] = {}  # the candidates that fit a block of the same class

    def __call__(self, unit: Unit, calls: Iterable[Call]) -> None:
        """Permute the hidden units that layers of this block read."""
        assert unit.module is not None
        calls = tuple(calls)
        inputs = self._observer(unit, calls)
        with self._plan.processes.fail_together():
            run = _Run(unit, calls, self._plan.processes)
            found = [units for reader in _sole_readers(unit, inputs) if (units := self._find(reader, unit, run))]
            orders = [self._choose(units, inputs[units.reader.name]) for units in found]
            kept = {u.reader.name: self._kept(u, o, inputs) for u, o in zip(found, orders, strict=True)}
            permutations = [*zip(found, orders, strict=True)]
            _permute_all(permutations)
            if run.gives_the_same():
                self._store.repeat(unit.name, partial(_permute_all, permutations))
                self.permuted.kept.update(kept)
            else:
                _permute_all([(units, order.argsort(dim=1)) for units, order in reversed(permutations)])

    def _find(self, reader: Layer, unit: Unit, run: _Run) -> HiddenUnits | None:
        """Return the units that a layer reads, if their order can be changed."""
        assert unit.module is not None
        parent = self._modules[reader.name.rpartition(".")[0]]
        key = type(unit.module), reader.name.removeprefix(unit.name)
        known = self._known.get(key)
        for index, units in enumerate(hidden_units(reader, parent, unit.module)):
            if (known is None or index in known) and self._is_movable(units) and run.accepts(units):
                self._known[key] = (index,)
                return units
        self._known.setdefault(key, ())
        return None

    def _is_movable(self, units: HiddenUnits) -> bool:
        """Whether groups fit into heads, and no other module has the same parameters."""
        tied = any((place.module, place.name) in self._tied for place in units.places)
        return not tied and units.columns.shape[2] % self._plan.config.pattern.group_size == 0

    def _choose(self, units: HiddenUnits, inputs: InputStatistics) -> Orders:
        """Return an order of the units of each head."""
        scores = Wanda()(units.reader.read(), inputs)
        by_head = scores[:, units.columns].permute(1, 0, 2, 3).flatten(1, 2)  # copies of a unit are further rows
        config = self._plan.config
        return torch.stack([config.permutation(each, config.pattern).cpu() for each in by_head])

    def _kept(self, units: HiddenUnits, orders: Orders, inputs: Mapping[str, InputStatistics]) -> tuple[float, float]:
        """Return the total score that the pattern keeps in the reader, before and after the permutation."""
        scores, pattern = Wanda()(units.reader.read(), inputs[units.reader.name]), self._plan.config.pattern
        before = kept_score(scores, torch.arange(scores.shape[1]), pattern)
        return before, kept_score(scores, units.source(orders), pattern)


def _permute_all(permutations: Iterable[tuple[HiddenUnits, Orders]]) -> None:
    for units, orders in permutations:
        units.permute(orders)


def _tied(model: nn.Module) -> set[tuple[nn.Module, str]]:
    """Return the module and the name of each parameter that several modules share."""
    found = [(m, name, p) for m in model.modules() for name, p in m.named_parameters(recurse=False)]
    counts = Counter(id(parameter) for _, _, parameter in found)
    return {(module, name) for module, name, parameter in found if counts[id(parameter)] > 1}


def _sole_readers(unit: Unit, inputs: Mapping[str, InputStatistics]) -> list[Layer]:
    """Return the layers whose input no other layer reads: layers with the same input share its statistics."""
    reached = [layer for layer in unit.layers if layer.name in inputs]
    readers = Counter(id(inputs[layer.name]) for layer in reached)
    return [layer for layer in reached if readers[id(inputs[layer.name])] == 1 and is_plain(layer)]


class _Run:
    """Runs a block on one batch, before and after a change of its weights."""

    def __init__(self, unit: Unit, calls: Sequence[Call], processes: Processes) -> None:
        self._unit, self._call, self._processes = unit, next(iter(calls), None), processes
        self._generator = torch.Generator().manual_seed(0)
        self._inputs, self._outputs = self._run()

    def accepts(self, units: HiddenUnits) -> bool:
        """Whether a random order of the units permutes what the reader receives, and changes nothing else."""
        heads, _, size = units.columns.shape
        orders = torch.stack([torch.randperm(size, generator=self._generator) for _ in range(heads)])
        units.permute(orders)
        try:
            same = self._call is None or self._is_permuted(units.reader.name, units.source(orders))
        finally:
            units.permute(orders.argsort(dim=1))
        return bool(self._processes.all_reduce_min(int(same)))

    def _is_permuted(self, reader: str, source: Tensor) -> bool:
        inputs, outputs = self._run()
        before, after = (each.get(reader, []) for each in (self._inputs, inputs))
        if not before or len(before) != len(after) or not _all_same(self._outputs, outputs):
            return False
        others = (_all_same(x, inputs.get(name, [])) for name, x in self._inputs.items() if name != reader)
        columns = (_same_columns(x[:, source.to(x.device)], y) for x, y in zip(before, after, strict=True))
        return all(others) and all(columns)

    def gives_the_same(self) -> bool:
        """Whether the block gives the same output as at first, to rounding."""
        _, outputs = self._run()
        return bool(self._processes.all_reduce_min(int(_all_same(self._outputs, outputs))))

    def _run(self) -> tuple[dict[str, list[Tensor]], list[Tensor]]:
        """Return the tokens that enter each layer, one tensor for each call, and what the block returns or writes."""
        if self._call is None:
            return {}, []
        inputs: dict[str, list[Tensor]] = {}

        def record(layer: Layer, module: nn.Module, args: tuple[Any, ...]) -> None:
            if args:
                inputs.setdefault(layer.name, []).append(layer.tokens(args[0]).clone())

        with ExitStack() as hooks:
            for layer in self._unit.layers:
                hooks.callback(layer.module.register_forward_pre_hook(partial(record, layer)).remove)
            args, kwargs = clone_arguments((self._call.args, self._call.kwargs))
            output = replace(self._call, args=args, kwargs=kwargs).run()
        # A block may pass keys and values to later blocks through an object among its arguments.
        results = tensors_within((output, args, kwargs))
        return inputs, [tensor for tensor in results if tensor.is_floating_point()]


def _same_columns(x: Tensor, y: Tensor) -> bool:
    """Whether all columns are the same to rounding. In 16 bits, most numbers are then exactly the same."""
    if x.shape != y.shape:
        return False
    limit = _tolerance(x, 1e-4)
    x, y = x.double(), y.double()
    difference = (x - y).abs()
    most = (difference <= 1e-4 * x.abs()).double().mean() > 0.9
    return bool(most & (difference.norm(dim=0) <= limit * x.norm(dim=0)).all())


def _all_same(before: Sequence[Tensor], after: Sequence[Tensor]) -> bool:
    """Whether tensors are the same to rounding, each as a whole."""
    return [x.shape for x in before] == [y.shape for y in after] and all(
        bool((x - y).double().norm() <= _tolerance(x, 1e-5) * x.double().norm())
        for x, y in zip(before, after, strict=True)
    )


def _tolerance(x: Tensor, smallest: float) -> float:
    return max(8 * torch.finfo(x.dtype).eps, smallest)
