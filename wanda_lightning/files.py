"""Write files and folders whole or not at all, and refuse places that cannot be written before the work begins.

A file or a folder is written under a temporary name and then renamed. The temporary name starts with `.wanda-` and is
locked while its process lives, so the next run into the same place can remove what a killed run left behind.
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
except ImportError:  # Windows: leftovers of killed runs stay
    fcntl = None  # type: ignore[assignment]

_PREFIX = ".wanda-"
_NOT_OURS = ("lost+found",)  # every fresh ext4 file system has one
_LAST = "config.json"  # a folder without it is not a model, so it arrives last


def _resolved(path: str | os.PathLike[str]) -> Path:
    return Path(path).expanduser().resolve()


# ------------------------------------------------------------------------------------------------------- refusals


def refuse_existing(path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Refuse a file that `whole_file` could not write.

    Raises:
        IsADirectoryError: If `path` is a folder.
        FileExistsError: If the file exists and `overwrite` is false.
        OSError: If nothing can be written there.
    """
    target = _resolved(path)
    with _naming(path):
        _clean_up(target.parent, target)
        if target.is_dir():
            raise IsADirectoryError(f"A file was to be written to {path}, but it is a folder. Name a file inside it.")
        if os.path.lexists(target) and not overwrite:
            raise FileExistsError(f"The file {path} exists. Choose another name, or replace it with overwrite=True.")
        _check_name(target)
        _try_to_write(target.parent)


def refuse_nonempty(path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Refuse a folder into which files cannot be written, or that holds something and `overwrite` is false.

    Raises:
        FileExistsError: If `path` is a file, or a folder that is not empty (without `overwrite`).
        OSError: If nothing can be written there.
    """
    target = _resolved(path)
    with _naming(path):
        for home in (target.parent, target):
            _clean_up(home, target)
        if os.path.lexists(target) and not target.is_dir():
            raise FileExistsError(f"A folder was to be written to {path}, but it is a file. Choose another path.")
        if _entries(target) and not overwrite:
            raise FileExistsError(
                f"The folder {path} is not empty. Choose another one, or allow it with overwrite=True."
            )
        _check_name(target)
        _try_to_write(target)


def refuse_replacement(path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Refuse a folder that `whole_folder` could not write.

    Raises:
        FileExistsError: As `refuse_nonempty`; also for a folder that holds something but is not a model (it has no
            `config.json`), or that contains the working directory.
        OSError: If nothing can be written there.
    """
    refuse_nonempty(path, overwrite)
    target = _resolved(path)
    if not _entries(target):
        return
    if not (target / "config.json").is_file():
        raise FileExistsError(
            f"Overwriting {path} would delete its files, but it is not a model (it has no config.json). "
            "Choose another folder, or empty this one."
        )
    if Path.cwd().is_relative_to(target):
        raise FileExistsError(
            f"Overwriting {path} would replace the folder that holds the working directory. Choose a folder inside it."
        )


def refuse_full(path: str | os.PathLike[str], size: int) -> None:
    """Refuse a place on a disk with less than `size` bytes of free space.

    Raises:
        OSError: Names the path, the space that is needed and the space that is free.
    """
    free = shutil.disk_usage(_existing(_resolved(path))).free
    if free < size:
        raise OSError(f"{path} needs {_megabytes(size)}, but {_megabytes(free)} are free on its disk. Free some space.")


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.2f} MB"


def _entries(folder: Path) -> list[Path]:
    """What a folder holds besides our own leftovers; nothing if there is no such folder."""
    if not folder.is_dir():
        return []
    return [entry for entry in folder.iterdir() if not entry.name.startswith((_PREFIX, *_NOT_OURS))]


def _existing(path: Path) -> Path:
    """The path itself or its nearest parent that exists."""
    return next(place for place in (path, *path.parents) if os.path.lexists(place))


def _check_name(target: Path) -> None:
    """Let the operating system refuse a name that is too long."""
    limit = os.pathconf(_existing(target), "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
    if any(len(os.fsencode(part)) > limit for part in target.parts):
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))


def _try_to_write(folder: Path) -> None:
    """Make and remove a folder in the nearest existing parent: neither permissions nor quotas tell beforehand."""
    place = _existing(folder)
    if not place.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{place} is a file, not a folder")
    probe = _temporary_name(place, folder)
    probe.mkdir()
    probe.rmdir()


@contextmanager
def _naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Name the path in an error of the operating system."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise type(error)(f"{path} cannot be written: {error.strerror}. Choose another path.") from error


# --------------------------------------------------------------------------------------------------------- writing


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path to write to; the file takes the place of `path` if the body ends without an error.

    Args:
        path: The file to write. An existing file is replaced; missing parent folders are made.

    Raises:
        IsADirectoryError: If `path` is a folder.
    """
    refuse_existing(path, overwrite=True)
    target = _resolved(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _temporary(target.parent, target) as new:
        with _explaining_a_full_disk(path, new):
            yield new
        os.replace(new, target)


@contextmanager
def whole_folder(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder to fill; it takes the place of `path` if the body ends without an error.

    A folder that cannot be renamed (a mount point, such as every Docker volume, or a folder in a parent that cannot be
    written) is kept, and the files are moved into it, `config.json` last.

    Args:
        path: The folder to write. Missing parent folders are made.
        overwrite: Replace a model's folder, with everything in it. The old one is deleted only after the new one has
            taken its place.

    Raises:
        FileExistsError: As `refuse_replacement` does, before anything is written.
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
                target.rmdir()  # Windows does not rename onto an empty folder; a folder filled meanwhile is refused.
            os.replace(new, target)


@contextmanager
def _explaining_a_full_disk(path: str | os.PathLike[str], new: Path) -> Iterator[None]:
    """Say in one sentence that the disk is full; safetensors, for one, has an error of its own for that."""
    try:
        yield
    except Exception as error:
        if os.strerror(errno.ENOSPC) not in str(error):
            raise
        files = new.rglob("*") if new.is_dir() else [new]
        written = sum(file.stat().st_size for file in files if file.is_file())
        free = shutil.disk_usage(_existing(new)).free
        raise OSError(
            f"{path} cannot be written, because its disk is full: after {_megabytes(written)} only {_megabytes(free)} "
            "are free. Free some space, or choose another path."
        ) from error


def unclaimed(path: str | os.PathLike[str], marker: str, overwrite: bool = False) -> Path:
    """The folder itself; or, if another run has finished there meanwhile, a free one beside it, such as `out-2`.

    Args:
        path: The folder.
        marker: The file that a finished run leaves in it.
        overwrite: Take the folder in any case.
    """
    target = _resolved(path)
    if overwrite or not (target / marker).exists():
        return Path(path)
    numbered = (target.with_name(f"{target.name}-{number}") for number in count(2))
    return next(place for place in numbered if not (place / marker).exists())


def _can_be_renamed(folder: Path) -> bool:
    if os.path.ismount(folder) or not os.access(folder.parent, os.W_OK | os.X_OK):
        return False
    try:  # a bind mount on the same device looks like a folder to os.path.ismount
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return True
    return str(folder).replace(" ", r"\040") not in {line.split()[4] for line in mounts.splitlines()}


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
        raise FileExistsError(f"The folder {target} is not empty any more: something was written to it meanwhile.")
    with _temporary(target, target, is_folder=True) as old:
        moved: list[tuple[Path, Path]] = []
        try:
            for entry in sorted(found, key=lambda entry: entry.name != _LAST):
                moved.append((entry, old / entry.name))
                os.replace(*moved[-1])
            for entry in sorted(new.iterdir(), key=lambda entry: entry.name == _LAST):
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
    """A new hidden name that is short, since names have a limit, and keeps the suffix of a file."""
    return home / f"{_label(target)}{uuid4().hex[:8]}{target.suffix[:16]}"


@contextmanager
def _temporary(home: Path, target: Path, is_folder: bool = False) -> Iterator[Path]:
    """Make and lock an empty file or folder, and remove it in the end if it is still there."""
    _clean_up(home, target)
    new = _temporary_name(home, target)
    new.mkdir() if is_folder else new.touch(exist_ok=False)
    lock = _lock(new)
    try:
        yield new
    finally:
        _remove(new)
        if lock is not None:
            os.close(lock)


def _clean_up(home: Path, target: Path) -> None:
    """Remove what killed runs left of this target: temporary files and folders that no living process has locked.

    A run that was killed while it replaced a folder has moved the old one aside: it comes back.
    """
    for leftover in home.glob(f"{_label(target)}*"):
        if fcntl is None or (lock := _lock(leftover)) is None:
            continue
        if leftover.is_dir() and (leftover / target.name).is_dir() and not target.exists():
            os.replace(leftover / target.name, target)
        _remove(leftover)
        os.close(lock)


def _lock(path: Path) -> int | None:
    """A descriptor that holds the lock of a file or folder until it is closed; None if another process has it."""
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


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
