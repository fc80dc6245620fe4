"""Run all calibration batches through any model side by side, and wait at each stop.

The model's own forward runs unchanged, once for each batch, each in a greenlet: a call stack that can be left in the
middle of a function and continued later, in the same thread. While the engine is active, the `forward` of the module at
a stop parks the batch that calls it, so the call returns to the scheduler. The scheduler advances each batch until it
is parked or finished, and passes the parked calls of one stop to the caller, which may run them, change weights, or
both. Then the scheduler runs each call, returns the outputs to the batches, and continues. Several processes with their
own batches wait at the same stops.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from contextvars import copy_context
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor
from torch.nn import Module

from wanda_lightning.calibration.error_notes import naming_batch
from wanda_lightning.calibration.interception import Multiply, Product, WeightInterceptor
from wanda_lightning.calibration.pruning_mode import patched
from wanda_lightning.calibration.samples import Sample
from wanda_lightning.calibration.surroundings import Surroundings, TorchState, refuse_transforms
from wanda_lightning.calibration.trees import clone_arguments
from wanda_lightning.common.aliases import Action, Forward, Kwargs
from wanda_lightning.models import Stop, head_within
from wanda_lightning.parallel import SINGLE_PROCESS, Processes


@dataclass(frozen=True)
class Call:
    """The call of the module at a stop, where a sample is parked before it runs."""

    sample: Sample
    stop: str  # name of the stop; "" for the whole model
    forward: Forward  # the module's own forward
    args: tuple[Any, ...]
    kwargs: Kwargs
    surroundings: Surroundings

    def run(self, on_copies: bool = False) -> Any:
        """Run the module and return its output; on clones of its arguments if it will run again on the same values."""
        with naming_batch(self.sample.batch_index, (self.args, self.kwargs), self.stop):
            if on_copies:
                return self.surroundings.try_out(self._on_copies)
            return self.surroundings.run(lambda: self.forward(*self.args, **self.kwargs))

    def _on_copies(self) -> Any:
        args, kwargs = clone_arguments((self.args, self.kwargs))
        return self.forward(*args, **kwargs)


def whole_model_calls(samples: Iterable[Sample], tick: Action = lambda: None) -> Iterator[Call]:
    """Yield calls of the whole model, each on one sample, which is read when it is its turn; `tick` follows each."""
    for sample in samples:
        yield Call(sample, "", sample.forward, (), {}, Surroundings.present())
        tick()


class Visit(NamedTuple):
    """A stop, and the calls of this process that wait there. They are valid until the next visit."""

    stop: Stop
    calls: list[Call]

    def continue_by(self, wrap: Callable[[Call], Call]) -> None:
        """Let each sample continue by the call that `wrap` returns for its own, such as one that is observed."""
        self.calls[:] = map(wrap, self.calls)


@dataclass(frozen=True)
class Visits(Iterator[Visit]):
    """The visits of all stops in turn. Closing it ends all samples and restores the modules."""

    stops: Sequence[Stop]
    # Names of the stops that samples reached after the visit, and so did not wait at; complete after the last visit.
    passed: set[str]
    visits: Generator[Visit]

    def __next__(self) -> Visit:
        return next(self.visits)

    def close(self) -> None:
        """End all samples, and restore the modules."""
        self.visits.close()


def lockstep(
    stops: Sequence[Stop],
    samples: Sequence[Sample],
    processes: Processes = SINGLE_PROCESS,
    to_end: bool = False,
    model: Module | None = None,
) -> Visits:
    """Visit each stop that a sample reaches, once, with all samples that are parked there.

    If samples are parked at different stops, the first of these in the given order is next. A sample that reaches a
    stop again, because the model calls its module several times, does not wait. After the last stop every sample ends,
    so the rest of the model is not computed. Only one sample continues, to the end of the model or to the output head
    of a language model, to find out whether the model calls a stop again.

    Args:
        stops: Their modules are disjoint.
        samples: The samples of this process.
        processes: All of them visit the same stops.
        to_end: Let the samples run to the end of the model, and wait at each visit of a stop.
        model: Contains the stops.

    Returns:
        The visits. Nothing runs before the first one is asked for. An exception, like `close`, ends all samples and
        restores the modules.
    """
    passed: set[str] = set()
    return Visits(stops, passed, _visits(stops, samples, processes, to_end, model, passed))


def run_to_head(model: Module, sample: Sample) -> None:
    """Run a sample alone, to the output head of a language model, or else to the end of the model."""
    with _ending_at_head(model), suppress(GreenletExit):
        sample.forward()


def _visits(
    stops: Sequence[Stop],
    samples: Sequence[Sample],
    processes: Processes,
    to_end: bool,
    model: Module | None,
    passed: set[str],
) -> Generator[Visit]:
    pending = set(range(len(stops)))
    with _parking(stops), ExitStack() as ends:
        batches = [_Batch(sample, stops) for sample in _parking_at_products(samples, stops)]
        for batch in batches:
            # In reverse order, as contexts nest: a batch may have entered one inside the context of the batch before.
            ends.callback(batch.end)
        with processes.fail_together():
            for batch in batches:
                batch.advance()

        while True:
            parked = [batch for batch in batches if batch.call]
            first_here = min((batch.stop for batch in parked), default=len(stops))
            index = processes.all_reduce_min(first_here)
            if index == len(stops):
                return

            batches_here = [batch for batch in parked if batch.stop == index]
            calls = [batch.call for batch in batches_here if batch.call]
            visit = Visit(stops[index], calls)
            if index not in pending and calls:
                passed.add(stops[index].name)
            if index in pending or to_end:
                yield visit

            pending.discard(index)
            if not pending and not to_end:
                if batches_here:
                    with _ending_at_head(model):
                        _find_passed(batches_here[-1], passed)  # the innermost
                return

            with processes.fail_together():
                for batch in batches_here:
                    # Popped, because parked activations must not outlive the run of the module.
                    output = visit.calls.pop(0).run()
                    batch.advance(output)
                    del output


def _find_passed(batch: _Batch, passed: set[str]) -> None:
    """Continue a sample from the last stop to the end of the model, and note the stops that it reaches on the way.

    ALBERT and looped models apply one block many times.
    """
    # The output of the model does not matter here, so neither do its errors.
    with suppress(Exception, GreenletExit):  # the last stop may hold the output head
        while batch.call:
            batch.advance(batch.call.run())
            if batch.call is None or batch.call.stop in passed:
                break
            passed.add(batch.call.stop)


@contextmanager
def _ending_at_head(model: Module | None) -> Iterator[None]:
    """End a sample at the output head of a language model, which calls no stop and is as large as some blocks."""
    head = head_within(model) if model is not None else None
    with patched(head, "forward", _end) if head is not None else nullcontext():
        yield


def _end(*args: object, **kwargs: object) -> None:
    raise GreenletExit


@contextmanager
def _parking(stops: Sequence[Stop]) -> Iterator[None]:
    """Replace the forward of the module at every stop, so that samples park there."""
    with ExitStack() as restored:
        for index, stop in enumerate(stops):
            module = stop.module
            assert module is not None
            park = partial(_park, index, module.forward)
            restored.enter_context(patched(module, "forward", park))
        yield


def _parking_at_products(samples: Sequence[Sample], stops: Sequence[Stop]) -> Sequence[Sample]:
    """Also park samples where a model reads the weight of a layer directly instead of calling the layer."""
    index_of = {
        layer: index
        for index, stop in enumerate(stops)
        for layer in stop.layers
        if layer.module is stop.module and layer.expert is None
    }

    def park(products: list[Product], multiply: Multiply) -> Tensor:
        product = products[0]
        if product.row:  # a later piece of the matrix: the sample has waited at the first
            return multiply()
        # The tokens are passed only so that the visit sees them as the layer's input.
        return _park(index_of[product.layer], lambda tokens: multiply(), product.tokens)

    def watched(forward: Callable[[], object]) -> object:
        interceptor = WeightInterceptor(index_of, park)  # each sample has its own
        with interceptor if interceptor.memory else nullcontext():
            return forward()

    if not index_of:
        return samples
    return [replace(sample, forward=partial(watched, sample.forward)) for sample in samples]


def _park(stop: int, forward: Forward, *args: Any, **kwargs: Any) -> Any:
    """Park the current batch and return the module's output; run the forward if no batch is running."""
    batch = getcurrent()
    if isinstance(batch, _Batch):
        return batch.park(stop, forward, args, kwargs)
    return forward(*args, **kwargs)


class _Batch(greenlet):
    """The forward pass of one sample, which parks at stops.

    Uncaught, `GreenletExit` ends it. Models rarely catch that, because it is no `Exception`.
    """

    def __init__(self, sample: Sample, stops: Sequence[Stop]) -> None:
        super().__init__()
        # The call at which the batch is parked; None while it runs and after its end.
        self.call: Call | None = None
        self.stop = -1  # index of the stop at which the batch is parked, or was parked last
        self._sample = sample
        self._stops = stops
        self._ended = False
        self._output: Any = None

        self._outside = copy_context()
        # A context of its own for each batch: transformers collects router logits in context variables.
        self._context = self._outside.copy()
        self.gr_context = self._context
        with torch.no_grad():
            self._state = TorchState()

    def run(self) -> None:
        """Run the model's forward until its end (called by `advance`)."""
        self._sample.forward()

    def park(self, stop: int, forward: Forward, args: Any, kwargs: Any) -> Any:
        """Wait at a stop for the output of its module (called in the batch)."""
        if self._ended:  # the model caught `GreenletExit`, or calls a module in a `finally` block
            raise GreenletExit
        refuse_transforms(self._stops[stop].name)
        self._state = TorchState()
        self.stop = stop
        surroundings = Surroundings(self._context, self._state, self._outside)
        name = self._stops[stop].name
        self.call = Call(self._sample, name, forward, args, kwargs, surroundings)
        del args, kwargs  # the scheduler frees the activations when the module has run

        assert self.parent is not None
        self.parent.switch()

        output = self._output
        self._output = None
        return output

    def advance(self, output: Any = None) -> None:
        """Let the batch run to its next stop, or to its end (called by the scheduler)."""
        self.call = None
        self._output = output
        self.parent = getcurrent()
        del output  # this frame must not hold it while the batch runs
        with self._state.entered(exactly=True):
            self.switch()

    def end(self) -> None:
        """End the batch if it runs."""
        self.call = None
        self._ended = True
        if self:
            self.parent = getcurrent()
            # The code of the model may meet `GreenletExit` in any way.
            with self._state.entered(exactly=True), suppress(Exception):
                self.throw()
