"""Run all calibration batches through any model side by side, and stop at each unit.

The model's own forward runs unchanged, once for each batch, each in a thread of its own. While the engine is active,
the `forward` of every unit parks the batch that calls it. Only one thread runs at a time: the scheduler, which is the
caller's thread, or one batch. The scheduler advances each batch until it is parked or finished, and passes the parked
calls of one unit to the caller, which may run the unit on them, change its weights, or both. Then the scheduler runs
the unit on each call, returns the outputs to the batches, and continues. Several processes with their own batches stop
at the same units.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from wanda_lightning.calibration.cloning import clone_arguments
from wanda_lightning.calibration.error_notes import naming_batch
from wanda_lightning.calibration.mode import patched
from wanda_lightning.calibration.samples import Sample
from wanda_lightning.calibration.thread_state import Switches, ThreadState, end_idle_workers, keeps_many_workers
from wanda_lightning.parallel import SINGLE_PROCESS, Processes, entry_point, is_sharded

Forward = Callable[..., Any]


@dataclass(frozen=True)
class Call:
    """The call of a unit at which a sample is parked, before the unit runs."""

    sample: Sample
    unit: str  # name of the unit; "" for the whole model
    forward: Forward  # the unit's own forward
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    thread_state: ThreadState  # of the sample's thread at the call

    def run(self, on_copies: bool = False) -> Any:
        """Run the unit and return its output; on clones of its arguments if it will run again on the same values."""
        arguments = self.args, self.kwargs
        with naming_batch(self.sample.batch_index, arguments, self.unit), self.thread_state.entered():
            args, kwargs = clone_arguments(arguments) if on_copies else arguments
            return self.forward(*args, **kwargs)


class Stop(NamedTuple):
    """All batches that are parked at one unit."""

    unit: int  # index of the unit
    calls: list[Call]  # one for each batch at the unit; empty if only other processes are there


def lockstep(
    samples: Sequence[Sample],
    units: Sequence[nn.Module | None],
    names: Sequence[str] = (),
    processes: Processes = SINGLE_PROCESS,
    revisited: set[int] | None = None,
    to_end: bool = False,
    prepared: Callable[[int, Call], Call] = lambda unit, call: call,
) -> Iterator[Stop]:
    """Stop once at each unit that a batch reaches, with all batches that are parked there.

    If batches are parked at different units, the next stop is at the first of these in the given order. A batch that
    reaches a unit again, because the model applies it several times, runs through it without a stop. After the last
    unit every batch ends, so the rest of the model is not computed. Only one batch continues, up to the next module
    with a matrix of its own, to find out whether the model calls a unit again.

    Units are disjoint modules in the order of the stops; None is a stop at which batches `park` themselves. `revisited`
    receives the index of every unit that a batch reaches again. With `to_end`, the batches run to the end of the model.
    `prepared` takes the index of a unit and the call with which a batch will continue, and returns the call to run.

    Yields:
        The stops, whose calls are valid until the next one. Closing the generator, or an exception, ends all threads
        and restores the modules.
    """
    revisited = set() if revisited is None else revisited
    pending = set(range(len(units)))
    names = names or [type(unit).__name__ for unit in units]
    with _parking(units), _batch_threads(samples, names) as threads:
        with processes.fail_together():
            for thread in threads:
                thread.start()
                thread.advance()
        while True:
            parked = [thread for thread in threads if thread.call is not None]
            unit = processes.all_reduce_min(min((thread.unit for thread in parked), default=len(units)))
            if unit == len(units):
                return
            here = [thread for thread in parked if thread.unit == unit]
            if unit in pending:
                stop = Stop(unit, [thread.call for thread in here if thread.call is not None])
                yield stop
                stop.calls.clear()  # or parked activations would outlive the run of the unit
                pending.remove(unit)
            else:
                revisited.add(unit)
            if not pending and not to_end:
                modules = [unit for unit in units if unit is not None]
                # FSDP2 communicates: all processes continue, or none.
                if processes.all_agree(bool(here)) if any(map(is_sharded, modules)) else here:
                    _find_revisits(here[0], modules, revisited)
                return
            with processes.fail_together():
                for thread in here:
                    thread.run_unit(partial(prepared, unit))


def _find_revisits(thread: _BatchThread, units: Sequence[nn.Module], revisited: set[int]) -> None:
    """Continue a batch after the last unit, and add to `revisited` the indices of the units that it reaches again.

    ALBERT and looped models apply one block many times. A global hook, which sees the calls of all modules, ends the
    batch at the first module that has a matrix and contains no unit, such as the output head.
    """
    inside = set(units)

    def stop(module: nn.Module, args: object) -> None:
        if threading.current_thread() is not thread or not inside.isdisjoint(module.modules()):
            return
        if any(parameter.ndim > 1 for parameter in module.parameters()):
            raise _StopForward

    hook = register_module_forward_pre_hook(stop)
    try:
        with suppress(Exception):  # the output of the model does not matter here, so neither do its errors
            thread.run_unit()
            while thread.call is not None and thread.unit not in revisited:
                revisited.add(thread.unit)
                thread.run_unit()
    finally:
        hook.remove()


@contextmanager
def _parking(units: Sequence[nn.Module | None]) -> Iterator[None]:
    """Replace the entry point of every unit, so that batches park there."""
    with ExitStack() as restored:
        for index, unit in enumerate(units):
            if unit is None:
                continue
            entry = entry_point(unit)
            restored.enter_context(patched(unit, "_compiled_call_impl", None))  # it would bypass the entry point
            restored.enter_context(patched(unit, entry, partial(park, index, getattr(unit, entry))))
        yield


def park(unit: int, forward: Forward, *args: Any, **kwargs: Any) -> Any:
    """Park the batch of the current thread and return the unit's output; outside a batch's thread, run the forward."""
    thread = threading.current_thread()
    if isinstance(thread, _BatchThread):
        return thread.park(unit, forward, args, kwargs)
    return forward(*args, **kwargs)


@contextmanager
def _batch_threads(samples: Sequence[Sample], names: Sequence[str]) -> Iterator[list[_BatchThread]]:
    """Construct one thread for each batch; end all threads at the end of this block."""
    state, ends_workers = ThreadState(), keeps_many_workers(len(samples))
    threads = [_BatchThread(sample, names, state, ends_workers) for sample in samples]
    try:
        yield threads
    finally:
        # In reverse order, as contexts nest: a batch may have entered a context inside the context of the batch before.
        for thread in reversed(threads):
            thread.cancel()


class _StopForward(BaseException):
    """Ends a batch's thread at its next unit. Models rarely catch it, because it is no `Exception`."""


class _BatchThread(threading.Thread):
    """The forward pass of one sample, which parks at units with the given names."""

    def __init__(self, sample: Sample, names: Sequence[str], thread_state: ThreadState, ends_workers: bool) -> None:
        super().__init__(name=f"calibration batch {sample.batch_index}", daemon=True)
        self.call: Call | None = None  # the call at which the batch is parked; None while it runs and after its end
        self.unit = -1  # index of the unit at which the batch is parked, or was parked last
        self._sample, self._names, self._thread_state, self._ends_workers = sample, names, thread_state, ends_workers
        self._output: Any = None
        self._error: BaseException | None = None
        self._cancelled = False
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)

    def run(self) -> None:
        """Run the model's forward while the scheduler waits."""
        self._go.acquire()
        try:
            if not self._cancelled:
                with self._thread_state.entered():
                    self._sample.forward()
        except _StopForward:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self.call = None
            self._back.release()

    def park(self, unit: int, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Wait at a unit for its output (called in the batch's thread)."""
        if self._cancelled:  # the model caught `_StopForward`, or calls a unit in a `finally` block
            raise _StopForward
        thread_state = ThreadState()
        call = Call(self._sample, self._names[unit], forward, args, kwargs, thread_state)
        self.unit, self.call = unit, call
        del call
        if self._ends_workers:
            end_idle_workers()
        self._back.release()
        self._go.acquire()
        thread_state.switches.restore()
        if self._cancelled:
            raise _StopForward
        output, self._output = self._output, None
        return output

    def advance(self, output: Any = None) -> None:
        """Let the batch run to its next unit, or to its end (called in the scheduler's thread)."""
        self.call, self._output = None, output
        del output
        switches = Switches()
        try:
            self._go.release()
            self._back.acquire()
        finally:
            switches.restore()
        if self._error is not None:
            raise self._error

    def run_unit(self, prepared: Callable[[Call], Call] = lambda call: call) -> None:
        """Run the parked call, or the one that `prepared` returns for it, and continue the batch with its output."""
        assert self.call is not None, "the batch is parked"
        self.advance(prepared(self.call).run())

    def cancel(self) -> None:
        """End the thread if it runs, and wait until it has ended."""
        if self.is_alive():
            switches = Switches()
            self._cancelled = True
            self._go.release()
            self.join()
            switches.restore()
