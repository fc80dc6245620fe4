"""Copy memory between an accelerator and the host, beside the computations where the accelerator can.

This is the only file that knows streams and events. `Transfers` works on every device, and waits for each copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Memory = torch.UntypedStorage


class Arrival(NamedTuple):
    """Memory of the device into which a copy has begun."""

    memory: Memory
    wait: Callable[[], None]  # returns when all of it is there; nothing may use the memory before


class Transfers:
    """Copies memory between a device and the host, one copy after another.

    Args:
        device: Where the memory is that leaves and returns.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def leave(self, memory: Memory) -> Memory:
        """Copy memory to the host. Only `begin_return` may read the copy, which may not be complete yet."""
        return _empty(memory, torch.device("cpu")).copy_(_bytes(memory)).untyped_storage()

    def begin_return(self, memory: Memory) -> Arrival:
        """Begin to copy memory of the host to the device."""
        return Arrival(_empty(memory, self.device).copy_(_bytes(memory)).untyped_storage(), lambda: None)


class CudaTransfers(Transfers):
    """Copies to pinned memory without waiting, and back on a stream of its own, while kernels run.

    Memory leaves in the order of the kernels, so its place on the device is free for the next ones. It returns after
    all that was started when its copy began, and beside what is started later. The caller's thread waits until it has
    returned, so that it is never more than one batch ahead of the device, whose memory would otherwise fill up.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._stream = torch.cuda.Stream(device)
        self._left = torch.cuda.Event()  # when all memory that has left is on the host

    def leave(self, memory: Memory) -> Memory:
        """Start a copy to pinned memory after the kernels that were started before."""
        leaving, stream = _bytes(memory), torch.cuda.current_stream(self.device)
        leaving.record_stream(stream)  # it may have been made on another one
        host = _empty(memory, torch.device("cpu"), pin_memory=True).copy_(leaving, non_blocking=True)
        self._left.record(stream)
        return host.untyped_storage()

    def begin_return(self, memory: Memory) -> Arrival:
        """Start a copy to the device; an event says when it is complete."""
        copy = _empty(memory, self.device)
        copy.record_stream(self._stream)  # if it is freed during the copy, nothing else gets the memory until its end
        self._stream.wait_event(self._left)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))  # for the last kernels that used `copy`
        with torch.cuda.stream(self._stream):
            copy.copy_(_bytes(memory), non_blocking=True)
        return Arrival(copy.untyped_storage(), self._stream.record_event().synchronize)


def transfers_for(device: torch.device) -> Transfers:
    """Return the transfers that suit a device."""
    return CudaTransfers(device) if device.type == "cuda" else Transfers(device)


def _bytes(memory: Memory) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=memory.device).set_(memory)


def _empty(memory: Memory, device: torch.device, pin_memory: bool = False) -> Tensor:
    return torch.empty(memory.nbytes(), dtype=torch.uint8, device=device, pin_memory=pin_memory)
