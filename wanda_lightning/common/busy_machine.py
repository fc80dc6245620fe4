"""Notice other programs that take the cores, where OpenMP's threads that wait for each other make everything slow.

OpenMP's threads spin while they wait. If other programs need the cores, a thread spins until its time slice ends, at
every parallel region, while the thread that it waits for has no core.
"""

import logging
import os
import time
from functools import cache

log = logging.getLogger(__name__)

OPENMP_WAITING = frozenset({"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"})
"""The environment variables that say how OpenMP's threads wait: of the standard, of GCC, and of LLVM and Intel."""


def warn_if_busy() -> None:
    """Warn, once in a process, if other programs take most of the cores and threads spin; called before a long task."""
    if is_busy(os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, time.process_time()):
        _warn()


def is_busy(load: float, own_seconds: float) -> bool:
    """Whether the load of the last minute, less this process's share, is more than half of the cores.

    The share is the processor time of the whole process, at most that of a minute on all cores.
    """
    cores = os.cpu_count() or 1
    own = min(own_seconds / 60, cores)
    return load - own > cores / 2


@cache  # once in a process: OpenMP reads the variables only when it is loaded
def _warn() -> None:
    if not OPENMP_WAITING.isdisjoint(os.environ):
        return
    import torch  # here, because the command reads `OPENMP_WAITING` before it imports torch

    if torch.get_num_threads() > 1:
        log.warning(
            "the machine is busy: other programs use most of its cores. OpenMP's threads spin while they wait for each "
            "other, which makes a run several times slower beside other programs. Set OMP_WAIT_POLICY=passive before "
            "Python starts."
        )
