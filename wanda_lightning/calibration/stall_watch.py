"""Report a batch that does not move: it may wait for something that only another waiting batch can release."""

from __future__ import annotations

import logging
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, NamedTuple

log = logging.getLogger(__name__)

PATIENCE = 60.0  # seconds


class _Running(NamedTuple):
    batch_index: int
    since: float  # seconds


class StallWatch:
    """Logs, once, where a batch is that has run for a minute without reaching a stop.

    Batches take turns in one thread. If one holds a lock between two stops, and the next one waits for it, neither can
    go on. A thread of its own looks at the clock, because the waiting thread cannot.
    """

    reported: ClassVar = False  # in this process

    def __init__(self) -> None:
        self._observed = threading.get_ident()
        self._observer = threading.Thread(target=self._watch, name="stall-watch", daemon=True)
        self._finished = threading.Event()
        self._running: _Running | None = None

    def __enter__(self) -> StallWatch:
        self._observer.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._finished.set()
        self._observer.join()

    @contextmanager
    def watching(self, batch_index: int) -> Iterator[None]:
        """Watch a batch that runs in this block."""
        self._running = _Running(batch_index, time.monotonic())
        try:
            yield
        finally:
            self._running = None

    def _watch(self) -> None:
        while not StallWatch.reported and not self._finished.wait(PATIENCE / 4):
            running = self._running
            if running and time.monotonic() - running.since > PATIENCE:
                StallWatch.reported = True
                self._report(running.batch_index)

    def _report(self, batch_index: int) -> None:
        stack = traceback.format_stack(sys._current_frames()[self._observed])
        log.warning(
            f"Calibration batch {batch_index} (counted from 0) has run for more than {PATIENCE:.0f} seconds without "
            "reaching the end of a block or layer. If the model is not just slow there, it may wait for a lock "
            "that another batch holds, and wait forever: stop it and use sequential='none', which runs the batches "
            f"one after another. It is here:\n{''.join(stack[-12:])}"
        )
