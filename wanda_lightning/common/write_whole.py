"""Write files and folders so that they appear as a whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from wanda_lightning.common.checks import check_flags, check_path
from wanda_lightning.common.killed_runs import entries, flush_folder, replace_entries, replace_folder, temporary
from wanda_lightning.common.refuse_path import (
    existing_parent,
    megabytes,
    refuse_existing,
    refuse_replacement,
    resolved,
)


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path to write to; the file replaces `path` if the body ends without an error.

    Missing parent folders are created. A folder is refused with an IsADirectoryError.
    """
    refuse_existing(path, overwrite=True)
    target = resolved(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with temporary(target.parent, target) as new, _explaining_a_full_disk(path, new):
        yield new
        replace_file(new, target)


def replace_file(new: Path, target: Path) -> None:
    """Rename a file so that even after a power failure either it or the one that it replaces is there as a whole."""
    _flush(new)
    os.replace(new, target)
    flush_folder(target.parent)


def _flush(file: Path) -> None:
    """Write a file from the cache of the operating system to the disk."""
    with file.open("rb" if os.name == "posix" else "rb+") as opened:  # a file may be read-only
        os.fsync(opened.fileno())


@contextmanager
def whole_folder(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder to fill; it replaces `path` if the body ends without an error.

    A folder that cannot be renamed (a mount point such as a Docker volume, or a folder in a read-only parent) is kept,
    and the files are moved into it, `config.json` last. Missing parent folders are created. `overwrite` replaces the
    folder of a model with everything in it, unless `refuse_replacement` refuses; the old content is deleted last, when
    the new one is on the disk.
    """
    check_path(folder=path)
    check_flags(overwrite=overwrite)
    with reserved(path, overwrite) as new:
        with _explaining_a_full_disk(path, new):
            yield new
            _flush_all(new)
        target = resolved(path)
        if new.parent == target:
            if entries(target) and not overwrite:
                raise FileExistsError(f"{path} is no longer empty: another process has written to it.")
            replace_entries(target, new)
        elif overwrite and target.exists():
            replace_folder(target, new)
        else:
            if target.exists():
                target.rmdir()  # Windows cannot rename to an existing folder; fails if the folder is no longer empty
            os.replace(new, target)
            flush_folder(target.parent)


@contextmanager
def reserved(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Reserve a folder against other processes until the body ends; yield a temporary folder on the same file system.

    `refuse_replacement` may refuse it.
    """
    refuse_replacement(path, overwrite)
    target = resolved(path)
    home = _home(target)
    created = [folder for folder in (home, *home.parents) if not folder.exists()]
    home.mkdir(parents=True, exist_ok=True)
    try:
        with temporary(home, target, is_folder=True) as new:
            yield new
    finally:
        for folder in created:
            with suppress(OSError):  # it has been written to
                folder.rmdir()


def _home(target: Path) -> Path:
    """Return where the temporary folder is: beside the folder, or in it if it cannot be renamed."""
    return target if target.is_dir() and not _can_be_renamed(target) else target.parent


def _flush_all(folder: Path) -> None:
    for entry in (folder, *folder.rglob("*")):
        if entry.is_dir():
            flush_folder(entry)
        elif entry.is_file():
            _flush(entry)


@contextmanager
def _explaining_a_full_disk(path: str | os.PathLike[str], new: Path) -> Iterator[None]:
    """Turn any error about a full disk or a limit (safetensors has its own class) into an OSError that explains it."""
    try:
        yield
    except Exception as error:
        codes = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
        reason = next((text for text in map(os.strerror, codes) if text in str(error)), None)
        if reason is None:
            raise
        files = new.rglob("*") if new.is_dir() else [new]
        written = sum(file.stat().st_size for file in files if file.is_file())
        free = shutil.disk_usage(existing_parent(new)).free
        raise OSError(
            f"{path} cannot be written: {reason}, after {megabytes(written)}; {megabytes(free)} are free on the disk."
            " Free some space, raise the limit, or choose another path."
        ) from error


def unclaimed(path: str | os.PathLike[str], is_free: Callable[[Path], bool]) -> Path:
    """Return the folder if it is free, or else the first free one next to it, such as `out-2`.

    A folder that was free when the work began may no longer be so when it ends, and the result must not be lost.
    """
    target = resolved(path)
    if is_free(target):
        return Path(path)
    return next(place for number in count(2) if is_free(place := target.with_name(f"{target.name}-{number}")))


def _can_be_renamed(folder: Path) -> bool:
    if os.path.ismount(folder) or not os.access(folder.parent, os.W_OK | os.X_OK):
        return False
    if Path.cwd().is_relative_to(folder):  # a shell or a process that is in it would be left in a deleted folder
        return False
    mounts = Path("/proc/self/mountinfo")  # os.path.ismount does not detect a bind mount on the same device
    lines = mounts.read_text("utf-8", "surrogateescape").splitlines() if mounts.exists() else []
    return str(folder).replace(" ", r"\040") not in {line.split()[4] for line in lines}
