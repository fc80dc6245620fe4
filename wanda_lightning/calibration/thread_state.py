"""Copy the PyTorch state of one thread to another, and end its idle workers.

PyTorch keeps grad mode, autocast, inference mode, the default device, and the current device and streams of the
accelerator per thread, and a few switches per process. A forward pass depends on all of them, and a model may change
them between two units, for example in a `with torch.autocast(...)` block. Calibration batches run in threads of their
own, and their units run in the scheduler's thread, so each call must carry this state along.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch


def _current_streams() -> tuple[int, list[torch.Stream]] | None:
    """Return the current device and the current stream of each device; None before the accelerator is used."""
    accelerator = torch.accelerator.current_accelerator()
    # `mps` has no such function, and a single stream.
    if accelerator is None or not getattr(torch.get_device_module(accelerator), "is_initialized", bool)():
        return None
    streams = [torch.accelerator.current_stream(device) for device in range(torch.accelerator.device_count())]
    return torch.accelerator.current_device_index(), streams


def _set_streams(current: tuple[int, list[torch.Stream]] | None) -> None:
    if current is not None:
        device, streams = current
        for index, stream in enumerate(streams):
            if stream != torch.accelerator.current_stream(index):
                torch.accelerator.set_stream(stream)  # changes the current device, too
        torch.accelerator.set_device_index(device)


# Process-wide switches: without restoring them, a batch would see the values that another batch has set.
_SWITCHES: tuple[tuple[Callable[[], Any], Callable[[Any], object]], ...] = (
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
    (_current_streams, _set_streams),  # of this thread
)


class Switches:
    """PyTorch's process-wide switches and this thread's streams, which models change in a `with` block."""

    def __init__(self) -> None:
        self._values = [read() for read, _ in _SWITCHES]

    def restore(self) -> None:
        """Set every switch that has changed back to its value."""
        for (read, write), value in zip(_SWITCHES, self._values, strict=True):
            if read() != value:
                write(value)


class ThreadState:
    """The state of the current thread, and the switches, at the time of construction."""

    def __init__(self) -> None:
        devices = {"cpu"}
        if (accelerator := torch.accelerator.current_accelerator(check_available=True)) is not None:
            devices.add(accelerator.type)
        self.switches = Switches()
        self._inference = torch.is_inference_mode_enabled()
        self._autocast = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in sorted(devices)]
        self._default_device = torch.get_default_device()

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Switch the current thread to this state, without gradients; restore its own state at the end."""
        with ExitStack() as stack:
            stack.callback(Switches().restore)
            self.switches.restore()
            stack.enter_context(torch.inference_mode(self._inference))
            stack.enter_context(torch.no_grad())
            if self._default_device != torch.get_default_device():
                stack.enter_context(self._default_device)
            for device, enabled, dtype in self._autocast:
                # No cache: it would give the pruned run the cast of a dense weight.
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False))
            yield


MOST_IDLE_WORKERS = 512
"""In all threads together. To end workers takes time, in particular on a busy machine."""

_SOFT_PAUSE = 1  # omp_pause_soft of OpenMP 5.0: keeps the settings


def keeps_many_workers(threads: int) -> bool:
    """Whether so many threads would keep too many workers.

    GNU OpenMP keeps a team of workers for each thread that has computed in parallel, as samples do between the units:
    128 samples on 64 cores would keep 8,000. LLVM's OpenMP shares its workers among threads.
    """
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
