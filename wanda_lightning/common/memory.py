"""Free space on disks."""

from __future__ import annotations

import os
import shutil

from wanda_lightning.common.atomic_write import resolve_path


def require_space(path: str | os.PathLike[str], size: int) -> None:
    """Raise an OSError for a path on a disk with less than `size` bytes of free space."""
    target = resolve_path(path)
    free = shutil.disk_usage(next(place for place in (target, *target.parents) if place.exists())).free
    if free < size:
        raise OSError(
            f"{path} needs {size / 1e6:,.2f} MB, but {free / 1e6:,.2f} MB are free on its disk. Free some space."
        )
