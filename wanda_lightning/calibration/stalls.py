"""Detect that a forward pass waits for a lock that a parked batch holds.

A parked batch keeps every lock that its model has acquired. If another batch needs the same lock, it waits forever. No
exception reports this, so a watchdog thread inspects the stack of the one thread that should run. It reports a stall
only if the thread stays at one instruction that acquires a lock in ten consecutive inspections, and uses no CPU time in
between. Loading data, sleeping, and waiting for a GPU, for another process or for the end of a thread do not count,
however long they take, because they are no lock instructions of Python.
"""

from __future__ import annotations

import dis
import linecache
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NamedTuple

import psutil

from wanda_lightning.calibration.batch_thread import BatchThread

INTERVAL = 6.0  # seconds between two inspections
LOOKS = 10
_LOCK_MODULES = {"threading", "queue", "multiprocessing.synchronize"}  # they acquire locks on behalf of their caller
_WAITS_FOR_THREADS = {"join", "result", "_wait_for_tstate_lock"}  # functions that wait for threads and futures


class StallDetector(threading.Thread):
    """Watches the thread that should run, and ends all batches if it stalls."""

    def __init__(self) -> None:
        super().__init__(name="calibration watchdog", daemon=True)
        self.batches: Sequence[BatchThread] = ()
        self.message = ""  # explains the stall, if there was one
        self._running: threading.Thread | None = None
        self._turn = 0
        self._done = threading.Event()

    @contextmanager
    def watching(self, thread: threading.Thread) -> Iterator[None]:
        """Watch a thread during this block, and raise a ValueError if it stalled."""
        self._turn += 1
        self._running = thread
        try:
            yield
        finally:
            self._running = None
        if self.message:
            raise ValueError(self.message)

    def run(self) -> None:
        """Inspect the watched thread until `stop` is called or the thread stalls."""
        last: _LockWait | None = None
        looks = 0
        while not self._done.wait(INTERVAL):
            turn, thread = self._turn, self._running
            now = None if thread is None else _LockWait.of(thread, turn)
            looks = looks + 1 if now is not None and now == last else 0
            last = now
            if looks == LOOKS and thread is not None and now is not None:
                self.message = self._explain(thread, now.place)
                self._release(thread)
                return

    def _explain(self, stalled: threading.Thread, place: str) -> str:
        calls = [batch.call for batch in self.batches if batch.call is not None]
        holders = ", ".join(f"batch {call.batch} at {call.unit}" for call in calls) or "no batch"
        return (
            f"sequential must be 'none' for this model: it seems to keep a lock from one unit to the next, so its "
            f"batches cannot run side by side. In {stalled.name}, {place} has waited for a lock for "
            f"{INTERVAL * LOOKS:.0f} seconds, while these are parked inside the model: {holders}. Use "
            "sequential='none', which runs one batch after the other, or let the model release the lock in each unit."
        )

    def _release(self, stalled: threading.Thread) -> None:
        """End all batches, the stalled one last: its lock is free after a parked batch has ended."""
        for batch in reversed(self.batches):
            if batch is not stalled:
                batch.cancel(timeout=1)
        if isinstance(stalled, BatchThread):
            stalled.cancel(timeout=1)
            stalled.abandon()

    def stop(self) -> None:
        """End the watchdog."""
        self._done.set()
        self.join()


class _LockWait(NamedTuple):
    """A thread that is at an instruction that acquires a lock."""

    turn: int  # number of the `watching` block in which the thread runs
    frame: FrameType  # its innermost frame
    instruction: int  # index in the code of the frame
    cpu_time: float  # of the thread so far, in seconds

    @classmethod
    def of(cls, thread: threading.Thread, turn: int) -> _LockWait | None:
        """Inspect a thread; return None if its current instruction does not acquire a lock."""
        frame = sys._current_frames().get(thread.ident or 0)
        if frame is None or not _takes_lock(frame) or _outside(frame).f_code.co_name in _WAITS_FOR_THREADS:
            return None
        times = {item.id: item.user_time + item.system_time for item in psutil.Process().threads()}
        return cls(turn, frame, frame.f_lasti, times.get(thread.native_id, 0.0))

    @property
    def place(self) -> str:
        """File, line and function that acquire the lock."""
        frame = _outside(self.frame)
        return f"{frame.f_code.co_filename}:{frame.f_lineno} ({frame.f_code.co_name})"


def _outside(frame: FrameType) -> FrameType:
    """Return the first caller outside of `_LOCK_MODULES`, or a function inside them that waits for a thread."""
    while frame.f_globals.get("__name__") in _LOCK_MODULES and frame.f_code.co_name not in _WAITS_FOR_THREADS:
        if frame.f_back is None:
            break
        frame = frame.f_back
    return frame


def _takes_lock(frame: FrameType) -> bool:
    """Whether a frame's current instruction enters a `with` block, or is on a line that calls `acquire`."""
    if frame.f_globals.get("__name__") in _LOCK_MODULES:
        return True
    current = [i for i in dis.get_instructions(frame.f_code) if i.offset <= frame.f_lasti and i.opname != "CACHE"]
    # An `__enter__` in Python would have a frame of its own, so this one is written in C, as for locks.
    if current and current[-1].opname in ("BEFORE_WITH", "SETUP_WITH"):
        return True
    return "acquire" in linecache.getline(frame.f_code.co_filename, frame.f_lineno)
