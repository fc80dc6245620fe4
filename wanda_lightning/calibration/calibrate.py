"""Stop all calibration batches at each unit in turn."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

from wanda_lightning.calibration.batch_thread import Call, park
from wanda_lightning.calibration.batches import CalibrationBatches
from wanda_lightning.calibration.interception import Product, WeightInterceptor
from wanda_lightning.calibration.lockstep import lockstep, whole_model_stop
from wanda_lightning.calibration.observer import Observer
from wanda_lightning.models import Unit
from wanda_lightning.parallel import Processes, fsdp_calls_checked


class UnitStop(NamedTuple):
    """The calibration batches at one unit that is about to be pruned."""

    unit: Unit
    calls: Iterable[Call]  # one for each batch, to iterate once
    # Call it after iterating `calls`: it refuses empty data, and batches that took other paths in other processes.
    check: Callable[[], None]


def calibrate(
    model: nn.Module, units: Sequence[Unit], batches: CalibrationBatches, processes: Processes, revisited: set[int]
) -> Generator[UnitStop]:
    """Stop at each unit with all batches that reach it; after each stop the batches run through the pruned unit.

    A single unit without a module stands for the whole model. The indices of units that a batch reaches again are added
    to `revisited`.
    """
    with fsdp_calls_checked(model, processes) as check_calls:
        if units[0].module is None:

            def check() -> None:
                check_calls("", 0)
                batches.refuse_if_empty()

            yield UnitStop(units[0], whole_model_stop(batches).calls, check)
            return
        forwards = list(batches)
        batches.refuse_if_empty()
        modules, names = [unit.module for unit in units if unit.module is not None], [unit.name for unit in units]
        parking = _parking_at_products(forwards, units)
        for stop in lockstep(parking, modules, processes, names, revisited, make_parking=batches.make_parking):
            unit, calls = units[stop.unit], stop.calls
            del stop  # or its parked activations would outlive the run of the pruned unit
            check_calls(unit.name, len(tuple(calls)))
            yield UnitStop(unit, calls, lambda: None)
            del calls


def watch_units(
    units: Sequence[Unit], batches: CalibrationBatches, observer: Observer, hold: Callable[[str], None]
) -> Iterator[Unit]:
    """Run each batch once through the dense model, side by side, and read the inputs of all units as they run.

    The sums are the ones that the observer collects if the batches run one after another. If a batch visits a unit
    several times, they are added in another order, so that the last digits can differ. `observer.finish` returns them.

    Yields:
        Each unit before the batches run through it; `hold` is called with its name before each batch does.
    """

    def prepared(index: int, call: Call) -> Call:
        hold(units[index].name)
        return observer.watched(units[index], call)

    forwards = list(batches)
    batches.refuse_if_empty()
    modules, names = [unit.module for unit in units if unit.module is not None], [unit.name for unit in units]
    stops = lockstep(
        _parking_at_products(forwards, units),
        modules,
        observer.processes,
        names,
        to_end=True,
        prepared=prepared,
        make_parking=batches.make_parking,
    )
    for stop in stops:
        yield units[stop.unit]


def _parking_at_products(forwards: list[Callable[[], object]], units: Sequence[Unit]) -> list[Callable[[], object]]:
    """Park batches also where a model multiplies by the weight of a unit that is a layer outside of its forward."""
    index_of = {
        layer: index
        for index, unit in enumerate(units)
        for layer in unit.layers
        if layer.module is unit.module and layer.expert is None
    }

    def stop(products: list[Product], multiply: Callable[[], Tensor]) -> Tensor:
        product = products[0]
        return (
            park(index_of[product.layer], lambda tokens: multiply(), product.tokens) if product.row == 0 else multiply()
        )

    def watched(forward: Callable[[], object]) -> object:
        interceptor = WeightInterceptor(index_of, stop)  # each thread has its own
        with interceptor if interceptor.watches else nullcontext():
            return forward()

    return [partial(watched, forward) for forward in forwards] if index_of else forwards
