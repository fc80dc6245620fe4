"""Write files and folders atomically, and check that a path can be written before the work begins.

A file or a folder is written under a temporary name and then renamed. The temporary name starts with `.wanda-`, and its
process holds a lock on it, so that a later run can remove the leftovers of a killed run.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from uuid import uuid4

try:
    import fcntl
except ImportError:  # Windows, where leftovers of killed runs are not removed
    fcntl = None  # type: ignore[assignment]

_PREFIX = ".wanda-"
_CONFIG = "config.json"  # a folder without it is not a model, so it is moved last
PROGRESS_NAME = "pruning_progress.json"
"""The file in a folder that is written part by part and not finished."""


def _resolved(path: str | os.PathLike[str]) -> Path:
    return Path(path).expanduser().resolve()


# ------------------------------------------------------------------------------------------------------- refusals


def refuse_existing(path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Raise an OSError for a file that `whole_file` could not write, or that exists without `overwrite`."""
    target = _resolved(path)
    with _naming(path):
        _clean_up(target.parent, target)
        if target.is_dir():
            raise IsADirectoryError(f"{path} must be a file, but it is a folder. Name a file inside it.")
        if os.path.lexists(target) and not overwrite:
            raise FileExistsError(f"{path} already exists. Choose another name, or replace it with overwrite=True.")
        _try_to_write(target.parent, target)


def refuse_nonempty(path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Raise an OSError for a folder to which files cannot be written, or that is not empty without `overwrite`."""
    target = _resolved(path)
    with _naming(path):
        for home in (target.parent, target):
            _clean_up(home, target)
        if os.path.lexists(target) and not target.is_dir():
            raise FileExistsError(f"{path} must be a folder, but it is a file. Choose another path.")
        if _entries(target) and not overwrite:
            raise FileExistsError(
                f"{path} is a folder that is not empty. Choose another, or allow it with overwrite=True."
            )
        _try_to_write(target, target)


def refuse_replacement(path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Raise an OSError for a folder that `whole_folder` could not write.

    Even with `overwrite`, a folder that is not empty is refused if it is not a model (it has no `config.json`), or
    contains the working directory.
    """
    refuse_nonempty(path, overwrite)
    target = _resolved(path)
    if not _entries(target):
        return
    if not (target / _CONFIG).is_file():
        raise FileExistsError(
            f"{path} has files that would be deleted and are not a model (there is no config.json). Choose another "
            "folder, or empty this one."
        )
    if Path.cwd().is_relative_to(target):
        raise FileExistsError(
            f"{path} contains the working directory, so it cannot be replaced. Choose a folder inside it."
        )


def refuse_unresumable(path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Raise an OSError for a folder that is neither empty nor left by an interrupted run, whatever `overwrite` is."""
    target = _resolved(path)
    if (target / PROGRESS_NAME).is_file():
        return
    if target.is_dir() and _entries(target):
        raise FileExistsError(
            f"{path} is a folder that is not empty, and no interrupted run left it. Choose another, or empty it."
        )
    refuse_nonempty(path)


def refuse_full(path: str | os.PathLike[str], size: int) -> None:
    """Raise an OSError for a path on a disk with less than `size` bytes of free space."""
    free = shutil.disk_usage(existing_parent(path)).free
    if free < size:
        raise OSError(f"{path} needs {_megabytes(size)}, but {_megabytes(free)} are free on its disk. Free some space.")


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.2f} MB"


def _entries(folder: Path) -> list[Path]:
    """List a folder, if it exists, without our leftovers and the `lost+found` of an ext4 file system."""
    entries = folder.iterdir() if folder.is_dir() else ()
    return [entry for entry in entries if not entry.name.startswith((_PREFIX, "lost+found"))]


def existing_parent(path: str | os.PathLike[str]) -> Path:
    """Return the path itself or its nearest parent that exists."""
    target = _resolved(path)
    return next(place for place in (target, *target.parents) if os.path.lexists(place))


def _try_to_write(folder: Path, target: Path) -> None:
    """Raise the error of the operating system for a name that is too long, or a place that cannot be written to."""
    place = existing_parent(folder)
    limit = os.pathconf(place, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
    if any(len(os.fsencode(part)) > limit for part in target.parts):
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    if not place.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{place} is a file, not a folder")
    probe = _temporary_name(place, folder)  # permissions and quotas show only when something is created
    probe.mkdir()
    with suppress(FileNotFoundError):  # another process that checks the same path has cleaned it up
        probe.rmdir()


@contextmanager
def _naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Add the path to an error of the operating system."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise type(error)(f"{path} cannot be written: {error.strerror}. Choose another path.") from error


# --------------------------------------------------------------------------------------------------------- writing


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path to write to; the file replaces `path` if the body ends without an error.

    Missing parent folders are created. A folder is refused with an IsADirectoryError.
    """
    refuse_existing(path, overwrite=True)
    target = _resolved(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _temporary(target.parent, target) as new, _explaining_a_full_disk(path, new):
        yield new
        replace_file(new, target)


def replace_file(new: Path, target: Path) -> None:
    """Rename a file so that even after a power failure either it or the one that it replaces is there as a whole."""
    _flush(new)
    os.replace(new, target)
    flush_folder(target.parent)


def _flush(file: Path) -> None:
    """Write a file from the cache of the operating system to the disk."""
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())


def flush_folder(folder: Path) -> None:
    """Write the names of the files in a folder to the disk, where the file system can."""
    with suppress(OSError):  # Windows opens no folder, and some network file systems cannot flush one
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def whole_folder(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder to fill; it replaces `path` if the body ends without an error.

    A folder that cannot be renamed (a mount point such as a Docker volume, or a folder in a read-only parent) is kept,
    and the files are moved into it, `config.json` last. Missing parent folders are created.

    Args:
        path: The folder to write.
        overwrite: Replace a model's folder, with everything in it. The old one is deleted last.

    Raises:
        OSError: If `refuse_replacement` refuses the folder.
    """
    refuse_replacement(path, overwrite)
    target = _resolved(path)
    inside = target.is_dir() and not _can_be_renamed(target)
    home = target if inside else target.parent
    home.mkdir(parents=True, exist_ok=True)
    with _temporary(home, target, is_folder=True) as new:
        with _explaining_a_full_disk(path, new):
            yield new
        if inside:
            _move_into(target, new, overwrite)
        elif overwrite and target.exists():
            _swap(new, target)
        else:
            if target.exists():
                target.rmdir()  # Windows cannot rename to an existing folder; fails if the folder is no longer empty
            os.replace(new, target)


@contextmanager
def _explaining_a_full_disk(path: str | os.PathLike[str], new: Path) -> Iterator[None]:
    """Turn any error about a full disk (safetensors has its own class) into an OSError that explains it."""
    try:
        yield
    except Exception as error:
        if os.strerror(errno.ENOSPC) not in str(error):
            raise
        files = new.rglob("*") if new.is_dir() else [new]
        written = sum(file.stat().st_size for file in files if file.is_file())
        free = shutil.disk_usage(existing_parent(new)).free
        raise OSError(
            f"{path} cannot be written, because its disk is full: after {_megabytes(written)} only {_megabytes(free)} "
            "are free. Free some space, or choose another path."
        ) from error


def unclaimed(path: str | os.PathLike[str], marker: str, overwrite: bool = False) -> Path:
    """Return the folder, or a free one next to it, such as `out-2`, if another run has left its `marker` file in it."""
    target = _resolved(path)
    if overwrite or not (target / marker).exists():
        return Path(path)
    numbered = (target.with_name(f"{target.name}-{number}") for number in count(2))
    return next(place for place in numbered if not (place / marker).exists())


def _can_be_renamed(folder: Path) -> bool:
    if os.path.ismount(folder) or not os.access(folder.parent, os.W_OK | os.X_OK):
        return False
    mounts = Path("/proc/self/mountinfo")  # os.path.ismount does not detect a bind mount on the same device
    lines = mounts.read_text("utf-8", "surrogateescape").splitlines() if mounts.exists() else []
    return str(folder).replace(" ", r"\040") not in {line.split()[4] for line in lines}


def _swap(new: Path, target: Path) -> None:
    with _temporary(target.parent, target, is_folder=True) as aside:
        old = aside / target.name
        os.replace(target, old)
        try:
            os.replace(new, target)
        except BaseException:
            os.replace(old, target)
            raise


def _move_into(target: Path, new: Path, overwrite: bool) -> None:
    if (found := _entries(target)) and not overwrite:
        raise FileExistsError(f"{target} is no longer empty: another process has written to it.")
    with _temporary(target, target, is_folder=True) as old:
        moved: list[tuple[Path, Path]] = []
        try:
            for entry in sorted(found, key=lambda entry: entry.name != _CONFIG):
                moved.append((entry, old / entry.name))
                os.replace(*moved[-1])
            for entry in sorted(new.iterdir(), key=lambda entry: entry.name == _CONFIG):
                moved.append((entry, target / entry.name))
                os.replace(*moved[-1])
        except BaseException:
            for source, place in reversed(moved):
                with suppress(FileNotFoundError):
                    os.replace(place, source)
            raise


# --------------------------------------------------------------------------------------------- temporary names


def _label(target: Path) -> str:
    return f"{_PREFIX}{hashlib.sha256(os.fsencode(target)).hexdigest()[:8]}-"


def _temporary_name(home: Path, target: Path) -> Path:
    """Return a new hidden name that is short, since names have a limit, and has the suffix of the file."""
    return home / f"{_label(target)}{uuid4().hex[:8]}{target.suffix[:16]}"


@contextmanager
def _temporary(home: Path, target: Path, is_folder: bool = False) -> Iterator[Path]:
    """Create and lock an empty file or folder, and remove it at the end if it still exists."""
    _clean_up(home, target)
    new = _temporary_name(home, target)
    new.mkdir() if is_folder else new.touch(exist_ok=False)
    held = lock(new)
    try:
        yield new
    finally:
        _remove(new)
        if held is not None:
            unlock(held)


def _clean_up(home: Path, target: Path) -> None:
    """Remove the leftovers of killed runs for this target: temporary files and folders that no process has locked.

    If a run was killed while it replaced a folder, the old folder is moved back first.
    """
    for leftover in home.glob(f"{_label(target)}*"):
        if (held := lock(leftover)) is None:
            continue
        if leftover.is_dir() and (leftover / target.name).is_dir() and not target.exists():
            os.replace(leftover / target.name, target)
        _remove(leftover)
        unlock(held)


def lock(path: Path) -> int | None:
    """Return a descriptor that locks a file or folder; None if another process has locked it."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # locked, or a file system without locks
        os.close(descriptor)
        return None
    return descriptor


def is_locked(path: Path) -> bool:
    """Whether another process has locked a file or folder; False if the file system has no locks."""
    if fcntl is None:
        return False
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def unlock(descriptor: int) -> None:
    """Release what `lock` returned."""
    os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
