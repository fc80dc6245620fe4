"""Write files and folders atomically, and check that a path can be written before the work begins.

A file or a folder is written under a temporary name and then renamed. The temporary name starts with `.wanda-`, and its
process holds a lock on it, so that a later run can finish or undo what a killed run began, and remove its leftovers.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from uuid import uuid4

try:
    import fcntl
except ImportError:  # Windows, where leftovers of killed runs are not removed
    fcntl = None  # type: ignore[assignment]

_PREFIX = ".wanda-"
_CONFIG = "config.json"  # a folder without it is not a model, so it is moved out first and in last
_DONE = "old"  # the name of old entries that are not needed any more
_WHOLE = "replaced by"  # a file beside old entries: all are out, and the folder that it names holds the new ones
_OURS: set[Path] = set()  # temporary names of this process
PROGRESS_NAME = "pruning_progress.json"
"""The file in a folder that is written part by part and not finished."""
ROW_WEIGHTS_NAME = "pruning_row_weights.safetensors"
"""Another one, of some methods."""


def _resolved(path: str | os.PathLike[str]) -> Path:
    return Path(os.path.expanduser(path)).resolve()  # Path.expanduser refuses ~ of an unknown user


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
    contains the working directory. A folder that another process has `reserved` is refused in any case.
    """
    refuse_nonempty(path, overwrite)
    target = _resolved(path)
    leftovers = [name for home in (target.parent, target) for name in _temporaries(home, target)]
    if any(is_locked(name) for name in leftovers if name not in _OURS):
        raise FileExistsError(
            f"{path} is reserved by another run, which will save a model there. Choose another folder, or wait for it."
        )
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


def files_in(folder: str | os.PathLike[str]) -> list[str]:
    """Return the names of the files of a model in a folder, relative to it and with slashes."""
    root = _resolved(folder)
    return sorted(
        file.relative_to(root).as_posix()
        for entry in _entries(root)
        for file in (entry, *entry.rglob("*"))
        if file.is_file() and file.name not in (PROGRESS_NAME, ROW_WEIGHTS_NAME)
    )


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
    with file.open("rb" if os.name == "posix" else "rb+") as opened:  # a file may be read-only
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
        overwrite: Replace a model's folder, with everything in it. The old one is deleted last, when the new one is on
            the disk.

    Raises:
        OSError: If `refuse_replacement` refuses the folder.
    """
    with reserved(path, overwrite) as new:
        with _explaining_a_full_disk(path, new):
            yield new
            _flush_all(new)
        target = _resolved(path)
        if new.parent == target:
            _move_into(target, new, overwrite)
        elif overwrite and target.exists():
            _swap(new, target)
        else:
            if target.exists():
                target.rmdir()  # Windows cannot rename to an existing folder; fails if the folder is no longer empty
            os.replace(new, target)
            flush_folder(target.parent)


@contextmanager
def reserved(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Make other processes refuse a folder until the body ends, and yield a temporary folder where it will be.

    Raises:
        OSError: If `refuse_replacement` refuses the folder.
    """
    refuse_replacement(path, overwrite)
    target = _resolved(path)
    home = _home(target)
    created = [folder for folder in (home, *home.parents) if not folder.exists()]
    home.mkdir(parents=True, exist_ok=True)
    try:
        with _temporary(home, target, is_folder=True) as new:
            yield new
    finally:
        for folder in created:
            with suppress(OSError):  # it has been written to
                folder.rmdir()


def _home(target: Path) -> Path:
    """Return where the temporary folder is: beside the folder, or in it if it cannot be renamed."""
    return target if target.is_dir() and not _can_be_renamed(target) else target.parent


def _flush_all(folder: Path) -> None:
    """Write a folder and everything in it to the disk."""
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
            f"{path} cannot be written: {reason}, after {_megabytes(written)}; {_megabytes(free)} are free on the disk."
            " Free some space, raise the limit, or choose another path."
        ) from error


def unclaimed(path: str | os.PathLike[str], is_free: Callable[[Path], bool]) -> Path:
    """Return the folder if it is free, or else the first free one next to it, such as `out-2`.

    A folder that was free when the work began may no longer be so when it ends, and the result must not be lost.
    """
    target = _resolved(path)
    if is_free(target):
        return Path(path)
    return next(place for number in count(2) if is_free(place := target.with_name(f"{target.name}-{number}")))


def is_replaceable(path: str | os.PathLike[str], overwrite: bool = False) -> bool:
    """Whether nothing is in a folder that keeps `whole_folder` from writing it."""
    try:
        refuse_replacement(path, overwrite)
    except FileExistsError:
        return False
    return True


def _can_be_renamed(folder: Path) -> bool:
    if os.path.ismount(folder) or not os.access(folder.parent, os.W_OK | os.X_OK):
        return False
    if Path.cwd().is_relative_to(folder):  # a shell or a process that is in it would be left in a deleted folder
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
        flush_folder(target.parent)


def _move_into(target: Path, new: Path, overwrite: bool) -> None:
    """Move the old entries of a folder out, and then the new ones in."""
    if _entries(target) and not overwrite:
        raise FileExistsError(f"{target} is no longer empty: another process has written to it.")
    with _temporary(target, target, is_folder=True) as aside:
        old, names = aside / target.name, [entry.name for entry in new.iterdir()]
        old.mkdir()
        try:
            _move_all(target, old)
            with whole_file(aside / _WHOLE) as mark:  # a killed run is undone before this, and finished after it
                mark.write_text(new.name, encoding="utf-8")
        except BaseException:
            _move_all(old, target)
            raise
        try:
            _move_all(new, target)
        except BaseException:
            (aside / _WHOLE).unlink()
            for name in names:
                with suppress(FileNotFoundError):
                    os.replace(target / name, new / name)
            _move_all(old, target)
            raise
        old.rename(aside / _DONE)  # a run that is killed while it deletes this leaves nothing to undo


def _move_all(source: Path, target: Path) -> None:
    """Move the entries of a folder: `config.json` first out of a model, and last into one.

    So a folder that is not whole never has one.
    """
    is_moved_out = source in target.parents
    for entry in sorted(_entries(source), key=lambda entry: (entry.name == _CONFIG) is not is_moved_out):
        os.replace(entry, target / entry.name)
    flush_folder(source)
    flush_folder(target)


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
    _OURS.add(new)
    new.mkdir() if is_folder else new.touch(exist_ok=False)
    held = lock(new)
    try:
        yield new
    finally:
        _remove(new)
        _OURS.discard(new)
        if held is not None:
            unlock(held)


def _temporaries(home: Path, target: Path) -> list[Path]:
    """Return the temporary files and folders for a target that exist."""
    return list(home.glob(f"{_label(target)}*"))


def _clean_up(home: Path, target: Path) -> None:
    """Remove the leftovers of killed runs for this target: temporary files and folders that no process has locked.

    If a run was killed while it replaced a folder, the old folder comes back first, or the new one is completed.
    """
    locks = {leftover: lock(leftover) for leftover in _temporaries(home, target)}
    held = {leftover: descriptor for leftover, descriptor in locks.items() if descriptor is not None}
    for leftover in held:
        _recover(leftover / target.name, target)
    for leftover, descriptor in held.items():
        _remove(leftover)
        unlock(descriptor)


def _recover(old: Path, target: Path) -> None:
    """Finish or undo the replacement of a folder, whose old content is in `old`."""
    if not old.is_dir():
        return
    whole = old.with_name(_WHOLE)
    if not target.exists():
        os.replace(old, target)
    elif old.parent.parent == target:  # a folder that cannot be renamed
        is_whole = whole.exists()
        _move_all(target / whole.read_text(encoding="utf-8") if is_whole else old, target)
        if is_whole:
            old.rename(old.with_name(_DONE))


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
    """Whether another process has locked a file or folder; False if it is gone, or if the file system has no locks."""
    if fcntl is None or not path.exists():
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
