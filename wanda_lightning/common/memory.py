"""Free memory of devices and free space on disks, and what does not fit in it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from wanda_lightning.common.atomic_write import resolve_path
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.words import as_gib

if TYPE_CHECKING:
    import torch


def check_memory(option: str, count: int, seqlen: int) -> None:
    """Raise a ValueError if `count` windows of `seqlen` tokens (8 bytes each) do not fit in the free memory."""
    size, free = 8 * seqlen, free_memory()
    if count * size > free:
        raise UserError(
            f"{option} must fit in memory, but {count} windows of {seqlen} tokens need {as_gib(count * size)} "
            f"and {as_gib(free)} are free. Use at most {free // size}."
        )


def require_space(path: str | os.PathLike[str], size: int) -> None:
    """Raise an OSError for a path on a disk with less than `size` bytes of free space."""
    target = resolve_path(path)
    free = shutil.disk_usage(next(place for place in (target, *target.parents) if place.exists())).free
    if free < size:
        raise OSError(
            f"{path} needs {size / 1e6:,.2f} MB, but {free / 1e6:,.2f} MB are free on its disk. Free some space."
        )


CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def free_memory(device: torch.device | None = None) -> int:
    """Return the free bytes of a device, by default of the machine, or of a container that has fewer."""
    if device is not None and device.type != "cpu":
        import torch

        with suppress(RuntimeError, ValueError):  # some backends do not say; another device than the accelerator
            return torch.accelerator.get_memory_info(device)[0]
    import psutil

    return min([psutil.virtual_memory().available, *_left_in_cgroups()])


def _left_in_cgroups() -> Iterator[int]:
    """Yield how much is left of each memory limit of Linux (control groups of version 2 or 1) for this process."""
    lines = OWN_CGROUPS.read_text(encoding="utf-8").splitlines() if OWN_CGROUPS.exists() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if not controllers:
            folder, limit, usage, cache = CGROUPS, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            folder, limit, usage = CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        own = folder / path.lstrip("/")  # inside a container, it may be the folder itself
        for each in (own, *(parent for parent in own.parents if parent.is_relative_to(folder))):
            with suppress(OSError, ValueError, KeyError):  # no such group, no limit ("max"), other files
                statistics = dict(line.split() for line in (each / "memory.stat").read_text().splitlines())
                used = int((each / usage).read_text()) - int(statistics[cache])  # the kernel frees its cache
                yield max(0, int((each / limit).read_text()) - used)
