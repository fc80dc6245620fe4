"""Run one calibration batch in a thread of its own, which waits at each unit until the scheduler resumes it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from wanda_lightning.calibration.cloning import clone_arguments
from wanda_lightning.calibration.error_notes import naming_batch
from wanda_lightning.calibration.openmp import end_idle_workers
from wanda_lightning.calibration.samples import Sample
from wanda_lightning.calibration.thread_state import Switches, ThreadState
from wanda_lightning.common.errors import UserError

Forward = Callable[..., Any]

IDLE_SECONDS = 120.0
"""Time without progress and without computation after which a batch counts as stalled."""


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


class Stalled(UserError):
    """A batch that reaches no unit although the process computes nothing."""

    def __init__(self, thread: BatchThread, place: str) -> None:
        super().__init__(f"batch {thread.sample.batch_index} has waited for {IDLE_SECONDS:g} seconds {place}")
        self.thread = thread


class StopForward(BaseException):
    """Ends a batch's thread at its next unit. Models rarely catch it, because it is no `Exception`."""


class BatchThread(threading.Thread):
    """The forward pass of one sample, which parks at units with the given names."""

    def __init__(
        self, sample: Sample, names: Sequence[str], thread_state: ThreadState, ends_workers: bool = False
    ) -> None:
        super().__init__(name=f"calibration batch {sample.batch_index}", daemon=True)
        self.sample = sample
        self.call: Call | None = None  # the call at which the batch is parked; None while it runs and after its end
        self.unit = -1  # index of the unit at which the batch is parked, or was parked last
        self._names, self._thread_state, self._ends_workers = names, thread_state, ends_workers
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
                    self.sample.forward()
        except StopForward:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self.call = None
            self._back.release()

    def park(self, unit: int, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Wait at a unit for its output (called in the batch's thread)."""
        if self._cancelled:  # the model caught StopForward, or calls a unit in a `finally` block
            raise StopForward
        thread_state = ThreadState()
        call = Call(self.sample, self._names[unit], forward, args, kwargs, thread_state)
        self.unit, self.call = unit, call
        del call
        if self._ends_workers:
            end_idle_workers()
        self._back.release()
        self._go.acquire()
        thread_state.switches.restore()
        if self._cancelled:
            raise StopForward
        output, self._output = self._output, None
        return output

    def advance(self, output: Any = None) -> None:
        """Let the batch run to its next unit, or to its end (called in the scheduler's thread)."""
        self.call, self._output = None, output
        del output
        switches = Switches()
        try:
            self._go.release()
            self._wait()
        finally:
            switches.restore()
        if self._error is not None:
            raise self._error

    def run_unit(self, prepared: Callable[[Call], Call] = lambda call: call) -> None:
        """Run the parked call, or the one that `prepared` returns for it, and continue the batch with its output."""
        assert self.call is not None, "the batch is parked"
        self.advance(prepared(self.call).run())

    def cancel(self, timeout: float | None = None) -> None:
        """End the thread if it runs, and wait at most `timeout` seconds until it has ended."""
        if not self.is_alive():
            return
        switches = Switches()
        self._cancelled = True
        self._go.release()
        self.join(timeout)
        switches.restore()

    def _wait(self) -> None:
        used = time.process_time()
        while not self._back.acquire(timeout=IDLE_SECONDS):
            before, used = used, time.process_time()
            if used - before < 0.1 * IDLE_SECONDS:  # progress bars and loggers compute a little
                raise Stalled(self, "before the first unit" if self.unit < 0 else f"after {self._names[self.unit]}")


def park(unit: int, forward: Forward, *args: Any, **kwargs: Any) -> Any:
    """Park the batch of the current thread and return the unit's output; outside a batch's thread, run the forward."""
    thread = threading.current_thread()
    if isinstance(thread, BatchThread):
        return thread.park(unit, forward, args, kwargs)
    return forward(*args, **kwargs)
