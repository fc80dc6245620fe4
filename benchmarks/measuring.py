"""Clocks and memory for the benchmarks."""

import ctypes
import gc
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

MIB = 2**20


def seconds(step: Callable[[], object]) -> float:
    """How long a step takes."""
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def medians(*clocks: Callable[[], float], runs: int, warm_up: bool = True) -> list[float]:
    """Medians of clocks that take turns, after a warm-up of each where asked."""
    rounds = [[clock() for clock in clocks] for _ in range(warm_up + runs)]
    return [statistics.median(times) for times in zip(*rounds[warm_up:], strict=True)]


class PeakMemory:
    """Samples this process's resident memory; what it rose by, in bytes."""

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        with suppress(OSError, AttributeError):  # of glibc: gives freed memory back, or the start would hold some
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        self.start, self.peak, self._stop = _resident(), 0, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(0.002):
            self.peak = max(self.peak, _resident() - self.start)


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096
