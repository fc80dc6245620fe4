"""Stop all calibration samples at each unit in turn."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

from torch import Tensor, nn

from wanda_lightning.calibration.batch_thread import Call, park
from wanda_lightning.calibration.interception import Product, WeightInterceptor
from wanda_lightning.calibration.lockstep import lockstep
from wanda_lightning.calibration.observer import Observer
from wanda_lightning.calibration.samples import Sample, Samples
from wanda_lightning.calibration.thread_state import ThreadState
from wanda_lightning.core.statistics import InputStatistics
from wanda_lightning.models import Unit
from wanda_lightning.parallel import Processes, fsdp_calls_checked

Record = Callable[[Iterable[Call]], Iterable[Call]]


@dataclass
class UnitStop:
    """A unit that is about to be pruned, with the statistics of its layers; there are none if none are needed."""

    unit: Unit
    inputs: Mapping[str, InputStatistics] = field(default_factory=dict)
    calls: Iterable[Call] | None = None  # to iterate once: through the unit, or one by one through the whole model
    check: Callable[[], None] = lambda: None  # after that: refuses samples that took other paths in other processes

    def observe(self, observer: Observer, record: Record) -> Mapping[str, InputStatistics]:
        """Return the statistics of the layers, over all processes; `record` sees each call that runs."""
        if self.calls is None:
            return self.inputs
        inputs = observer(self.unit, record(self.calls))
        self.check()
        return inputs


def whole_model_calls(samples: Iterable[Sample], tick: Callable[[], None] = lambda: None) -> Iterator[Call]:
    """Yield calls of the whole model, each on one sample, which is read when it is its turn; `tick` follows each."""
    thread_state = ThreadState()
    for sample in samples:
        yield Call(sample, "", sample.forward, (), {}, thread_state)
        tick()


def stop_at_units(
    model: nn.Module,
    units: Sequence[Unit],
    samples: Samples,
    processes: Processes,
    revisited: set[int],
    tick: Callable[[], None] = lambda: None,
) -> Generator[UnitStop]:
    """Stop at each unit with all samples that reach it; after each stop the samples run through the pruned unit.

    A single unit without a module stands for the whole model, through which each sample runs once. `tick` is called
    after each stop, or after each sample of the whole model. `revisited` receives the indices of units that a sample
    reaches again.
    """
    with fsdp_calls_checked(model, processes) as check_calls:
        if units[0].module is None:

            def check() -> None:
                check_calls("", 0)
                samples.refuse_if_empty()

            yield UnitStop(units[0], calls=whole_model_calls(samples, tick), check=check)
            return
        held = _parking_at_products(samples.hold(), units)
        for stop in lockstep(held, *_modules(units), processes, revisited):
            check_calls(units[stop.unit].name, len(stop.calls))
            yield UnitStop(units[stop.unit], calls=stop.calls)
            tick()


def watch_units(
    units: Sequence[Unit], samples: Samples, observer: Observer, hold: Callable[[str], None]
) -> Iterator[Unit]:
    """Run each sample once through the dense model, side by side, and read the inputs of all units as they run.

    The sums are the ones that the observer collects if the samples run one after another. If a sample visits a unit
    several times, they are added in another order, so that the last digits can differ. `observer.finish` returns them.

    Yields each unit before the samples run through it. `hold` is called with its name before each sample does.
    """

    def prepared(index: int, call: Call) -> Call:
        hold(units[index].name)
        return observer.watched(units[index], call)

    held = _parking_at_products(samples.hold(), units)
    for stop in lockstep(held, *_modules(units), observer.processes, to_end=True, prepared=prepared):
        yield units[stop.unit]


def _modules(units: Sequence[Unit]) -> tuple[list[nn.Module], list[str]]:
    return [unit.module for unit in units if unit.module is not None], [unit.name for unit in units]


def _parking_at_products(samples: list[Sample], units: Sequence[Unit]) -> list[Sample]:
    """Park samples also where a model multiplies by the weight of a unit that is a layer outside of its forward."""
    index_of = {
        layer: index
        for index, unit in enumerate(units)
        for layer in unit.layers
        if layer.module is unit.module and layer.expert is None
    }

    def stop(products: list[Product], multiply: Callable[[], Tensor]) -> Tensor:
        product = products[0]
        if product.row:
            return multiply()
        return park(index_of[product.layer], lambda tokens: multiply(), product.tokens)

    def watched(forward: Callable[[], object]) -> object:
        interceptor = WeightInterceptor(index_of, stop)  # each thread has its own
        with interceptor if interceptor.watches else nullcontext():
            return forward()

    return [replace(each, forward=partial(watched, each.forward)) for each in samples] if index_of else samples
