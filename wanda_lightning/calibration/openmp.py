"""End the idle OpenMP workers of a thread.

GNU OpenMP keeps a team of workers for each thread that has computed in parallel. Samples compute in threads of their
own between the units (attention, activations), so 128 samples on 64 cores would keep 8,000 idle workers. LLVM's OpenMP
shares its workers among threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

MOST_IDLE_WORKERS = 512
"""In all threads together. To end workers takes time, in particular on a busy machine."""

_SOFT_PAUSE = 1  # omp_pause_soft of OpenMP 5.0: keeps the settings


def keeps_many_workers(threads: int) -> bool:
    """Whether so many threads would keep too many workers."""
    return threads * (torch.get_num_threads() - 1) > MOST_IDLE_WORKERS


def end_idle_workers() -> None:
    """End the workers of the current thread, whose next parallel computation starts new ones."""
    _pause()(_SOFT_PAUSE)


@cache
def _pause() -> Callable[[int], Any]:
    for library in Path(torch.__file__).parent.glob("lib/libgomp*"):  # the one that PyTorch uses
        with suppress(OSError, AttributeError):
            return ctypes.CDLL(str(library)).omp_pause_resource_all
    return lambda kind: None
