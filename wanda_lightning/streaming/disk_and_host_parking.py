"""Keep the activations of waiting batches in files or in the memory of the host.

Between two units, a batch holds its activations in the call at which it waits, in local variables, and on the stack of
the interpreter. No code can replace all these references. But PyTorch can replace the memory behind a tensor
(`tensor.data = ...`), and so every reference stays valid. The new memory is a file, mapped into the address space, from
which the operating system reads what a forward pass uses; or, for activations on an accelerator, memory of the host,
which is copied back before the batch runs again. The file has no name, so it vanishes with its tensors.
"""

from __future__ import annotations

import ctypes
import mmap
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from wanda_lightning.calibration.cloning import tensors_within
from wanda_lightning.calibration.parking import MakeParking, Parking
from wanda_lightning.common.errors import UserError
from wanda_lightning.methods import PARKING

SMALLEST = 1 << 16
"""Bytes of the smallest memory that is worth moving."""

_FILES = "/dev/fd/"  # path of an open file; files of parked activations have no other name


class _MovingParking(TorchFunctionMode, Parking):
    """Finds the activations of one batch, to move them while the batch waits.

    The mode finds what the batch computes between the units, and `add` finds what the units return. Memory is replaced
    only if all tensors that share it are found, so that they continue to share it, and no other library points to it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, weakref.ref[Tensor]] = {}  # by id: an entry of a dead tensor may be overwritten

    def __torch_function__(
        self, function: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run a function, and note the tensors that it returns."""
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            self._note(value)
        return result

    def add(self, value: object) -> None:
        """Note the tensors within a value."""
        for tensor in tensors_within(value):
            self._note(tensor)

    def _note(self, value: object) -> None:
        if type(value) is Tensor:
            self._made[id(value)] = weakref.ref(value)

    def _alive(self) -> Iterator[list[Tensor]]:
        """Return the tensors that still exist, and those that they are views of, grouped by the memory they share."""
        alive = _alive(self._made.values())
        self._made = {id(tensor): weakref.ref(tensor) for tensor in alive}
        found = {id(tensor): tensor for tensor in alive}
        found |= {id(tensor._base): tensor._base for tensor in alive if tensor._base is not None}
        groups: dict[int, list[Tensor]] = {}
        for tensor in found.values():
            if torch._C._has_storage(tensor):
                groups.setdefault(tensor.untyped_storage()._cdata, []).append(tensor)
        yield from groups.values()


class DiskParking(_MovingParking):
    """The activations of one batch, which are in files of a folder while the batch waits."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def offload(self) -> None:
        """Move the activations to files; activations that were read back from files leave memory again."""
        has_moved = False
        for tensors in self._alive():
            memory = tensors[0].untyped_storage()
            if (memory.filename or "").startswith(_FILES):
                _leave_memory(memory)
            elif _can_move(tensors, "cpu"):
                _replace_memory(tensors, self._mapped_copy(memory))
                has_moved = True
            del memory
        if has_moved:
            return_freed_memory()

    def _mapped_copy(self, memory: torch.UntypedStorage) -> Any:
        try:
            with tempfile.TemporaryFile(dir=self._folder) as file:
                # Before it is mapped: a full disk is an error here, but kills a process that writes to a mapped file.
                file.write(torch.empty(0, dtype=torch.uint8, device="cpu").set_(memory).numpy().data)
                file.flush()
                return torch.UntypedStorage.from_file(f"{_FILES}{file.fileno()}", shared=True, nbytes=memory.nbytes())
        except (OSError, RuntimeError) as error:
            raise OSError(
                f"park='disk' keeps the activations of waiting batches in {self._folder}, but {memory.nbytes():,} "
                f"bytes could not be written there: {error}. Free some space on its disk, or use fewer or shorter "
                "samples."
            ) from error


_Group = list[weakref.ref[Tensor]]  # tensors that share their memory


class HostParking(_MovingParking):
    """The activations of one batch on an accelerator, which are in the memory of the host while the batch waits.

    `away` has the tensors that are on the host, by id, each with all tensors that share its memory. The parkings of all
    batches share it, since batches may share tensors that the model keeps.
    """

    def __init__(self, device: torch.device, away: dict[int, _Group]) -> None:
        super().__init__()
        self._device, self._away = device, away

    def __torch_function__(
        self, function: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run a function; first copy back arguments that another batch has moved."""
        for value in (*args, *(kwargs or {}).values()):
            for tensor in value if isinstance(value, tuple | list) else (value,):
                self._return(tensor)
        return super().__torch_function__(function, types, args, kwargs)

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        """Move back tensors that outlive the forward pass, such as the batch itself."""
        self.restore()
        for key in [key for key, group in self._away.items() if not _alive(group)]:
            del self._away[key]
        super().__exit__(exc_type, exc_val, exc_tb)  # type: ignore[no-untyped-call]

    def offload(self) -> None:
        """Move the activations to the host."""
        for tensors in self._alive():
            if not self._group_of(tensors[0]) and _can_move(tensors, self._device.type):
                _replace_memory(tensors, _copied(tensors[0].untyped_storage(), "cpu"))
                group = [weakref.ref(tensor) for tensor in tensors]
                self._away.update({id(tensor): group for tensor in tensors})

    def restore(self) -> None:
        """Move the activations back to the device."""
        for tensors in self._alive():
            self._return(tensors[0])

    def _return(self, value: object) -> None:
        """Move a tensor back to the device with all that share its memory, if it is on the host."""
        if tensors := self._group_of(value):
            _replace_memory(tensors, _copied(tensors[0].untyped_storage(), self._device))
            for tensor in tensors:
                self._away.pop(id(tensor), None)

    def _group_of(self, value: object) -> list[Tensor]:
        """Return all tensors that share the memory of an offloaded tensor; an empty list for any other value."""
        tensors = _alive(self._away.get(id(value), []))
        # A new tensor may have the id of one that is gone.
        return tensors if any(tensor is value for tensor in tensors) else []


def _alive(group: Iterable[weakref.ref[Tensor]]) -> list[Tensor]:
    return [tensor for reference in group if (tensor := reference()) is not None]


def _copied(memory: torch.UntypedStorage, device: torch.device | str) -> torch.UntypedStorage:
    source = torch.empty(0, dtype=torch.uint8, device=memory.device).set_(memory)
    return torch.empty(memory.nbytes(), dtype=torch.uint8, device=device).copy_(source).untyped_storage()


def _replace_memory(tensors: Sequence[Tensor], memory: torch.UntypedStorage) -> None:
    for tensor in tensors:
        place: Any = torch.empty(0, dtype=tensor.dtype, device=memory.device)
        tensor.data = place.set_(memory, tensor.storage_offset(), tensor.shape, tensor.stride())


def _can_move(tensors: Sequence[Any], device: str) -> bool:
    """Whether the memory is large and on a device, no other tensor shares it, and nothing but PyTorch points to it."""
    memory = tensors[0].untyped_storage()
    views = [id(tensor._base) for tensor in tensors if tensor._base is not None]
    return (
        memory.device.type == device
        and memory.nbytes() >= SMALLEST
        and memory.resizable()  # False once NumPy points to it
        and torch._C._storage_Use_Count(memory._cdata) == len(tensors) + 1  # and `memory`
        # A tensor that C++ code holds, for example for DLPack. A view holds its base.
        and all(tensor._use_count() == 1 + views.count(id(tensor)) for tensor in tensors)
        and all(map(_is_plain, tensors))
    )


def _is_plain(tensor: Tensor) -> bool:
    special = tensor.is_inference() or tensor.is_quantized or tensor.is_conj() or tensor.is_neg()
    return type(tensor) is Tensor and tensor.layout is torch.strided and not special


def _leave_memory(memory: torch.UntypedStorage) -> None:
    """Remove a mapped file from resident memory; what was written into it stays."""
    with suppress(OSError, AttributeError, TypeError):  # the call does not exist everywhere
        _libc().madvise(ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(memory.nbytes()), mmap.MADV_DONTNEED)


def return_freed_memory() -> None:
    """Return freed memory to the operating system: glibc keeps some of it for each thread that has allocated any."""
    with suppress(OSError, AttributeError, TypeError):
        _libc().malloc_trim(0)


@cache
def _libc() -> Any:
    return ctypes.CDLL(None)


def refuse_parking(park: str, device: str) -> None:
    """Refuse an unknown place for activations, and one that does not suit the device of the model."""
    if park not in PARKING:
        raise UserError(f"park must be one of {', '.join(PARKING)}, but it is {park!r}.")
    if not isinstance(device, str):
        raise UserError(f"device must be a text such as 'cpu' or 'cuda:0', but it is {device!r}.")
    is_cpu = device.startswith("cpu")
    if park == "disk" and not is_cpu:
        raise UserError(
            f"park='disk' moves activations out of the memory of the CPU, but device={device!r} has its own. Use "
            "park='cpu', which moves them to the memory of the CPU, or device='cpu'."
        )
    if park == "cpu" and is_cpu:
        raise UserError(
            f"park='cpu' moves activations from the device to the memory of the CPU, but device={device!r} keeps them "
            "there anyway. Use park='memory', or park='disk' if they do not fit."
        )


def parking_maker(park: str, device: torch.device, folder: Path) -> MakeParking:
    """Return a function that makes the parking of a batch; `folder` holds the files of `"disk"`."""
    if park == "disk":
        return partial(DiskParking, folder)
    return partial(HostParking, device, {}) if park == "cpu" else Parking
