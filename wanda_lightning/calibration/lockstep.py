"""Run all calibration batches through any model side by side, and wait at each stop.

The model's own forward runs unchanged, once for each batch, each in a thread of its own. While the engine is active,
the `forward` of the module at a stop parks the batch that calls it. Only one thread runs at a time: the scheduler,
which is the caller's thread, or one batch. The scheduler advances each batch until it is parked or finished, and passes
the parked calls of one stop to the caller, which may run them, change weights, or both. Then the scheduler runs each
call, returns the outputs to the batches, and continues. Several processes with their own batches wait at the same
stops.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from wanda_lightning.calibration.cloning import clone_arguments
from wanda_lightning.calibration.error_notes import naming_batch
from wanda_lightning.calibration.interception import Product, WeightInterceptor
from wanda_lightning.calibration.mode import patched
from wanda_lightning.calibration.samples import Sample
from wanda_lightning.models import Stop
from wanda_lightning.parallel import SINGLE_PROCESS, Processes

Forward = Callable[..., Any]


@dataclass(frozen=True)
class Call:
    """The call of the module at a stop, where a sample is parked before it runs."""

    sample: Sample
    stop: str  # name of the stop; "" for the whole model
    forward: Forward  # the module's own forward
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    thread_state: ThreadState  # of the sample's thread at the call

    def run(self, on_copies: bool = False) -> Any:
        """Run the module and return its output; on clones of its arguments if it will run again on the same values."""
        arguments = self.args, self.kwargs
        with naming_batch(self.sample.batch_index, arguments, self.stop), self.thread_state.entered():
            args, kwargs = clone_arguments(arguments) if on_copies else arguments
            return self.forward(*args, **kwargs)


def whole_model_calls(samples: Iterable[Sample], tick: Callable[[], None] = lambda: None) -> Iterator[Call]:
    """Yield calls of the whole model, each on one sample, which is read when it is its turn; `tick` follows each."""
    thread_state = ThreadState()
    for sample in samples:
        yield Call(sample, "", sample.forward, (), {}, thread_state)
        tick()


Stops = Generator[tuple[Stop, list[Call]]]
"""Stops, each with the calls of this process that wait there; these may be replaced."""


def lockstep(
    stops: Sequence[Stop],
    samples: Sequence[Sample],
    processes: Processes = SINGLE_PROCESS,
    revisited: set[str] | None = None,
    to_end: bool = False,
) -> Stops:
    """Yield each stop that a sample reaches, once, with all samples that are parked there.

    If samples are parked at different stops, the first of these in the given order is next. A sample that reaches a
    stop again, because the model calls its module several times, does not wait. After the last stop every sample ends,
    so the rest of the model is not computed. Only one sample continues, up to the next module with a matrix of its own,
    to find out whether the model calls one of these modules again.

    The modules of the stops are disjoint. `revisited` receives the name of every stop that a sample reaches again. With
    `to_end`, the samples run to the end of the model, and wait at each visit of a stop.

    Yields:
        The stops, whose calls are valid until the next one. Closing the generator, or an exception, ends all threads
        and restores the modules.
    """
    revisited = set() if revisited is None else revisited
    pending = set(range(len(stops)))
    with _parking(stops), _batch_threads(_parking_at_products(samples, stops), stops) as threads:
        with processes.fail_together():
            for thread in threads:
                thread.start()
                thread.advance()
        while True:
            parked = [thread for thread in threads if thread.call is not None]
            index = processes.all_reduce_min(min((thread.stop for thread in parked), default=len(stops)))
            here = [thread for thread in parked if thread.stop == index]
            if index == len(stops):
                return
            calls = [thread.call for thread in here if thread.call is not None]
            if index not in pending:
                revisited.add(stops[index].name)
            if index in pending or to_end:
                yield stops[index], calls
            pending.discard(index)
            if not pending and not to_end:
                if here:
                    _find_revisits(here[0], stops, revisited)
                return
            with processes.fail_together():
                for thread in here:  # parked activations must not outlive the run of the module
                    thread.advance(calls.pop(0).run())


def _find_revisits(thread: _BatchThread, stops: Sequence[Stop], revisited: set[str]) -> None:
    """Continue a sample after the last stop, and add to `revisited` the names of the stops that it reaches again.

    ALBERT and looped models apply one block many times. A global hook, which sees the calls of all modules, ends the
    sample at the first module that has a matrix and contains none of a stop, such as the output head.
    """
    inside = {stop.module for stop in stops}

    def end(module: nn.Module, args: object) -> None:
        if threading.current_thread() is not thread or not inside.isdisjoint(module.modules()):
            return
        if any(parameter.ndim > 1 for parameter in module.parameters()):
            raise _StopForward

    hook = register_module_forward_pre_hook(end)
    try:
        with suppress(Exception):  # the output of the model does not matter here, so neither do its errors
            while (call := thread.call) is not None:
                thread.advance(call.run())
                if thread.call is None or thread.call.stop in revisited:
                    break
                revisited.add(thread.call.stop)
    finally:
        hook.remove()


@contextmanager
def _parking(stops: Sequence[Stop]) -> Iterator[None]:
    """Replace the forward of the module at every stop, so that samples park there."""
    with ExitStack() as restored:
        for index, stop in enumerate(stops):
            module = stop.module
            assert module is not None
            restored.enter_context(patched(module, "_compiled_call_impl", None))  # it would bypass the forward
            restored.enter_context(patched(module, "forward", partial(_park, index, module.forward)))
        yield


def _parking_at_products(samples: Sequence[Sample], stops: Sequence[Stop]) -> Sequence[Sample]:
    """Park samples also where a model multiplies by the weight of a layer at a stop outside of its forward."""
    index_of = {
        layer: index
        for index, stop in enumerate(stops)
        for layer in stop.layers
        if layer.module is stop.module and layer.expert is None
    }

    def park(products: list[Product], multiply: Callable[[], Tensor]) -> Tensor:
        product = products[0]
        if product.row:
            return multiply()
        return _park(index_of[product.layer], lambda tokens: multiply(), product.tokens)

    def watched(forward: Callable[[], object]) -> object:
        interceptor = WeightInterceptor(index_of, park)  # each thread has its own
        with interceptor if interceptor.watches else nullcontext():
            return forward()

    return [replace(each, forward=partial(watched, each.forward)) for each in samples] if index_of else samples


def _park(stop: int, forward: Forward, *args: Any, **kwargs: Any) -> Any:
    """Park the batch of the current thread and return the module's output; in another thread, run the forward."""
    thread = threading.current_thread()
    if isinstance(thread, _BatchThread):
        return thread.park(stop, forward, args, kwargs)
    return forward(*args, **kwargs)


MOST_WORKERS = 512  # of OpenMP, for all threads of batches together: 128 samples on 64 cores would keep 8,000


@contextmanager
def _batch_threads(samples: Sequence[Sample], stops: Sequence[Stop]) -> Iterator[list[_BatchThread]]:
    """Construct one thread for each batch; end all threads at the end of this block."""
    state, cores = ThreadState(), torch.get_num_threads()
    # OpenMP keeps a team of workers for each thread that has computed in parallel, as samples do between the stops.
    own = min(cores, max(1, MOST_WORKERS // max(1, len(samples))))
    threads = [_BatchThread(sample, stops, state, own) for sample in samples]
    try:
        yield threads
    finally:
        # In reverse order, as contexts nest: a batch may have entered a context inside the context of the batch before.
        for thread in reversed(threads):
            thread.cancel()
        if own < cores:
            torch.set_num_threads(cores)  # what a thread sets holds for all that start later


class _StopForward(BaseException):
    """Ends a batch's thread at its next stop. Models rarely catch it, because it is no `Exception`."""


class _BatchThread(threading.Thread):
    """The forward pass of one sample, which parks at stops."""

    def __init__(self, sample: Sample, stops: Sequence[Stop], thread_state: ThreadState, cores: int) -> None:
        super().__init__(name=f"calibration batch {sample.batch_index}", daemon=True)
        self.call: Call | None = None  # the call at which the batch is parked; None while it runs and after its end
        self.stop = -1  # index of the stop at which the batch is parked, or was parked last
        self._sample, self._stops, self._thread_state, self._cores = sample, stops, thread_state, cores
        self._output: Any = None
        self._error: BaseException | None = None
        self._cancelled = False
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)

    def run(self) -> None:
        """Run the model's forward while the scheduler waits."""
        self._go.acquire()
        try:
            if not self._cancelled:
                if self._cores < torch.get_num_threads():
                    torch.set_num_threads(self._cores)
                with self._thread_state.entered():
                    self._sample.forward()
        except _StopForward:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self.call = None
            self._back.release()

    def park(self, stop: int, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Wait at a stop for the output of its module (called in the batch's thread)."""
        if self._cancelled:  # the model caught `_StopForward`, or calls a module in a `finally` block
            raise _StopForward
        call = Call(self._sample, self._stops[stop].name, forward, args, kwargs, ThreadState())
        self.stop, self.call = stop, call
        del call
        self._back.release()
        self._go.acquire()
        if self._cancelled:
            raise _StopForward
        output, self._output = self._output, None
        return output

    def advance(self, output: Any = None) -> None:
        """Let the batch run to its next stop, or to its end (called in the scheduler's thread)."""
        self.call, self._output = None, output
        del output
        self._go.release()
        self._back.acquire()
        if self._error is not None:
            raise self._error

    def cancel(self) -> None:
        """End the thread if it runs, and wait until it has ended."""
        if self.is_alive():
            self._cancelled = True
            self._go.release()
            self.join()


def _current_stream() -> torch.Stream | None:
    """Return the current stream, which determines the current device; None before the accelerator is used."""
    accelerator = torch.accelerator.current_accelerator()
    # `mps` has no such function, and a single stream.
    if accelerator is None or not getattr(torch.get_device_module(accelerator), "is_initialized", bool)():
        return None
    return torch.accelerator.current_stream()


def _set_stream(stream: torch.Stream | None) -> None:
    if stream is not None and stream != torch.accelerator.current_stream():
        torch.accelerator.set_stream(stream)  # changes the current device, too


class ThreadState:
    """The state of the current thread at the time of construction.

    PyTorch keeps grad mode, autocast, inference mode, the default device and the current stream for each thread. A
    model may change them between two stops, and the modules there run in another thread than the rest of the model.
    """

    def __init__(self) -> None:
        devices = {"cpu"}
        if (accelerator := torch.accelerator.current_accelerator(check_available=True)) is not None:
            devices.add(accelerator.type)
        self._stream = _current_stream()
        self._inference = torch.is_inference_mode_enabled()
        self._autocast = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in sorted(devices)]
        self._default_device = torch.get_default_device()

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Switch the current thread to this state, without gradients; restore its own state at the end."""
        with ExitStack() as stack:
            stack.callback(_set_stream, _current_stream())
            _set_stream(self._stream)
            stack.enter_context(torch.inference_mode(self._inference))
            stack.enter_context(torch.no_grad())
            if self._default_device != torch.get_default_device():
                stack.enter_context(self._default_device)
            for device, enabled, dtype in self._autocast:
                # No cache: it would give the pruned run the cast of a dense weight.
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False))
            yield
