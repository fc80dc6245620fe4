"""Notice other programs that take the cores, where OpenMP's threads that wait for each other make everything slow.

OpenMP's threads spin while they wait. If other programs need the cores, a thread spins until its time slice ends, at
every parallel region, while the thread that it waits for has no core.
"""

import logging
import os
import time
from functools import cache
from pathlib import Path

log = logging.getLogger(__name__)

OPENMP_WAITING = frozenset({"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"})
"""The environment variables that say how OpenMP's threads wait: of the standard, of GCC, and of LLVM and Intel."""

_AT_LEAST = 10.0  # seconds
# Linux writes three numbers: nanoseconds on a core, nanoseconds waiting for one, time slices.
_SCHEDULED = Path("/proc/thread-self/schedstat")


class CoreWatch:
    """Watches the thread that creates it, and warns once in a process if it waits for a core most of the time."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._waited_before = _seconds_waiting()

    def check(self) -> None:
        """Warn if the machine is busy and threads spin."""
        seconds = time.monotonic() - self._started
        if is_busy(seconds, _seconds_waiting() - self._waited_before):
            _warn()


def is_busy(seconds: float, waited: float) -> bool:
    """Whether a thread that was ready to run has waited for a core most of the time.

    Wall time divided by processor time would not do: it is as large where a run waits for its data.
    """
    return seconds >= _AT_LEAST and waited > seconds / 2


def _seconds_waiting() -> float:
    """Return how long this thread was ready to run, but had no core; 0 if the system does not count it."""
    try:
        return int(_SCHEDULED.read_text(encoding="ascii").split()[1]) / 1e9
    except OSError:  # not Linux
        return 0.0


@cache  # once in a process: OpenMP reads the variables only when it is loaded
def _warn() -> None:
    import torch  # here, because the command reads `OPENMP_WAITING` before it imports torch

    if OPENMP_WAITING.isdisjoint(os.environ) and torch.get_num_threads() > 1:
        log.warning(
            "the machine is busy: this thread spends most of its time waiting for a core. OpenMP's threads spin while "
            "they wait for each other, which makes the run several times slower beside other programs. Set "
            "OMP_WAIT_POLICY=passive before Python starts."
        )
