"""Stop all calibration samples at each unit in turn."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from typing import Any

from torch import Tensor, nn

from wanda_lightning.calibration.interception import Product, WeightInterceptor
from wanda_lightning.calibration.lockstep import Call, lockstep, park
from wanda_lightning.calibration.mode import patched
from wanda_lightning.calibration.observer import Observer
from wanda_lightning.calibration.samples import Sample, Samples
from wanda_lightning.calibration.thread_state import ThreadState
from wanda_lightning.calibration.weight_memory import weights_moved
from wanda_lightning.core.statistics import InputStatistics
from wanda_lightning.models import Unit
from wanda_lightning.models.module_names import named_modules
from wanda_lightning.parallel import Processes, free, fsdp_calls_checked, managers_around

Record = Callable[[Iterable[Call]], Iterable[Call]]


@dataclass
class UnitStop:
    """A unit that is about to be pruned, with the statistics of its layers; there are none if none are needed."""

    unit: Unit
    inputs: Mapping[str, InputStatistics] = field(default_factory=dict)
    calls: Iterable[Call] | None = None  # to iterate once: through the unit, or one by one through the whole model
    # After that: refuses samples that took other paths in other processes, or frees gathered weights.
    done: Callable[[], None] = lambda: None

    def observe(self, observer: Observer, record: Record) -> Mapping[str, InputStatistics]:
        """Return the statistics of the layers, over all processes; `record` sees each call that runs."""
        if self.calls is None:
            return self.inputs
        calls = record(self.calls)
        if self.inputs:  # of the dense model: the calls only record
            inputs = self.inputs
            for call in calls:
                call.run()
        else:
            inputs = observer(self.unit, calls)
        self.done()
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
    with fsdp_calls_checked(model, processes, weights_moved) as check_calls:
        if units[0].module is None:

            def check() -> None:
                check_calls("", 0)
                samples.refuse_if_empty()

            yield UnitStop(units[0], calls=whole_model_calls(samples, tick), done=check)
            return
        held = samples.hold()
        with ExitStack() as patches:
            stops, managers = _with_exits(model, units, patches)
            held, found = _parking_at_products(held, stops), set[int]()
            names = [*(stop.name for stop in stops), "the end of the model"]
            for stop in lockstep(held, [stop.module for stop in stops], names, processes, found):
                unit = stops[stop.unit]
                manager = managers.get(unit.name)
                if manager is None:  # otherwise the unit does not communicate, so its batches may differ in number
                    check_calls(unit.name, len(stop.calls))
                if unit.module is not None:
                    yield UnitStop(unit, calls=stop.calls, done=partial(free, manager) if manager else lambda: None)
                    if manager:
                        manager.unshard()
                        weights_moved()
                    tick()
            again = {stop.name for index, stop in enumerate(stops) if index in found}
            revisited.update(index for index, unit in enumerate(units) if unit.name in again)


def _with_exits(model: nn.Module, units: Sequence[Unit], patches: ExitStack) -> tuple[list[Unit], dict[str, Any]]:
    """Add a stop without a module at the end of each FSDP2 module inside which batches park, after its last unit.

    FSDP2 frees the weights of a module when a batch leaves it. So all batches wait at its end for each other, and all
    processes gather the next module together. Also return the module that manages each such unit, by name.
    """
    around = managers_around(model, [(unit.module, unit.layers[0].module) for unit in units if unit.module])
    last = {module: index for index, inside in enumerate(around) for module in inside}
    stops, ends = list[Unit](), {module: name for name, module in named_modules(model).items()}
    for index, unit in enumerate(units):
        stops.append(unit)
        for module in reversed([module for module, end in last.items() if end == index]):  # inner modules first
            patches.enter_context(patched(module, "forward", _parking_at_end(module.forward, len(stops))))
            if index < len(units) - 1:  # afterwards no batch continues
                stops.append(Unit(f"the end of {ends[module] or 'the model'}", None, ()))
    return stops, {unit.name: inside[-1] for unit, inside in zip(units, around, strict=True) if inside}


def _parking_at_end(forward: Callable[..., Any], stop: int) -> Callable[..., Any]:
    @wraps(forward)
    def parking(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        park(stop, lambda: None)
        return output

    return parking


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
