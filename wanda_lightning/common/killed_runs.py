"""Temporary files and folders, which a later run finishes, undoes or removes if their process was killed.

A file or folder is written under a temporary name next to its target, or in it, and then renamed. The name starts with
`.wanda-`, and the process that writes holds a lock on it: what nobody has locked, a killed run has left.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

try:
    import fcntl
except ImportError:  # Windows, where leftovers of killed runs are not removed
    fcntl = None  # type: ignore[assignment]

_PREFIX = ".wanda-"
_OLD = ".wanda-old"  # where the old content of a folder is while it is replaced
CONFIG = "config.json"  # a folder without it is not a model, so it is moved out first and in last
OURS: set[Path] = set()  # temporary names of this process


def _label(target: Path) -> str:
    return f"{_PREFIX}{hashlib.sha256(os.fsencode(target)).hexdigest()[:8]}-"


def temporary_name(home: Path, target: Path) -> Path:
    """Return a new hidden name that is short, since names have a limit, and has the suffix of the file."""
    return home / f"{_label(target)}{uuid4().hex[:8]}{target.suffix[:16]}"


def temporaries(home: Path, target: Path) -> list[Path]:
    """Return the temporary files and folders for a target that exist."""
    return list(home.glob(f"{_label(target)}*"))


def entries(folder: Path) -> list[Path]:
    """List a folder, if it exists, without our leftovers and the `lost+found` of an ext4 file system."""
    found = folder.iterdir() if folder.is_dir() else ()
    return [entry for entry in found if not entry.name.startswith((_PREFIX, "lost+found"))]


@contextmanager
def temporary(home: Path, target: Path, is_folder: bool = False) -> Iterator[Path]:
    """Create and lock an empty file or folder, and remove it at the end if it still exists."""
    clean_up(home, target)
    new = temporary_name(home, target)
    OURS.add(new)
    new.mkdir() if is_folder else new.touch(exist_ok=False)
    held = lock(new)
    try:
        yield new
    finally:
        _remove(new)
        OURS.discard(new)
        unlock(held)


def clean_up(home: Path, target: Path) -> None:
    """Remove the leftovers of killed runs for this target: temporary files and folders that no process has locked.

    If a run was killed while it replaced a folder, the old folder comes back first, or the new one is completed.
    """
    locks = {leftover: lock(leftover) for leftover in temporaries(home, target)}
    held = {leftover: descriptor for leftover, descriptor in locks.items() if descriptor is not None}
    for leftover in held:
        _finish_or_undo(leftover, target)
    for leftover, descriptor in held.items():
        _remove(leftover)
        unlock(descriptor)


def _finish_or_undo(aside: Path, target: Path) -> None:
    """Undo the replacement of a folder whose old content is in `aside`, or finish it if all of it was out."""
    old = aside / _OLD
    if old.is_dir() and not target.exists():
        os.replace(old, target)
    elif aside.parent == target:  # a folder that cannot be renamed
        move_entries(old, target)
        for replaced in temporaries(aside, target):
            move_entries(target / replaced.name, target)


def replace_folder(target: Path, new: Path) -> None:
    """Rename `new`, a temporary folder, to the name of a folder."""
    with temporary(target.parent, target, is_folder=True) as aside:
        os.replace(target, aside / _OLD)
        try:
            os.replace(new, target)
        except BaseException:
            os.replace(aside / _OLD, target)
            raise
        flush_folder(target.parent)


def replace_entries(target: Path, new: Path) -> None:
    """Replace the content of a folder that cannot be renamed by that of `new`, a temporary folder in it."""
    with temporary(target, target, is_folder=True) as aside:
        old, replaced = aside / _OLD, aside / new.name
        old.mkdir()
        try:
            move_entries(target, old)
            os.replace(old, replaced)  # before this, `clean_up` undoes what a killed run began; after it, finishes it
            flush_folder(aside)
            try:
                move_entries(new, target)
            except BaseException:
                os.replace(replaced, old)
                move_entries(target, new)
                raise
        except BaseException:
            move_entries(old, target)
            raise


def move_entries(source: Path, target: Path) -> None:
    """Move the entries of a folder: `config.json` first out of a model, and last into one.

    So a folder that is not whole never has one.
    """
    is_moved_out = source in target.parents
    for entry in sorted(entries(source), key=lambda entry: (entry.name == CONFIG) is not is_moved_out):
        os.replace(entry, target / entry.name)
    flush_folder(source)
    flush_folder(target)


def flush_folder(folder: Path) -> None:
    """Write the names of the files in a folder to the disk, where the file system can."""
    with suppress(OSError):  # Windows opens no folder, and some network file systems cannot flush one
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def lock(path: Path) -> int | None:
    """Return a descriptor that locks a file or folder; None if another process has locked it."""
    with suppress(OSError):  # locked, gone, or on a file system without locks
        return _lock(path)
    return None


def is_locked(path: Path) -> bool:
    """Whether another process has locked a file or folder; False if it is gone, or if the file system has no locks."""
    try:
        unlock(_lock(path))
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _lock(path: Path) -> int | None:
    if fcntl is None:
        return None
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def unlock(descriptor: int | None) -> None:
    """Release what `lock` returned."""
    if descriptor is not None:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
