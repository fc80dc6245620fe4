"""Refuse paths that cannot be written, or whose content would be lost, before the work begins."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from wanda_lightning.common.killed_runs import CONFIG, OURS, clean_up, entries, is_locked, temporaries, temporary_name

PROGRESS_NAME = "pruning_progress.json"
"""In a folder that is written part by part: the record of the parts written so far."""
ROW_WEIGHTS_NAME = "pruning_row_weights.safetensors"
"""In the same folder, for some methods: the weights of rows."""


def resolved(path: str | os.PathLike[str]) -> Path:
    """Return the absolute path, without symbolic links and `~`; raise an OSError for links that form a loop."""
    target = Path(os.path.realpath(os.path.expanduser(path)))  # Path.expanduser refuses ~ of an unknown user
    if any(map(os.path.islink, (target, *target.parents))):
        raise OSError(f"{path} cannot be written: {os.strerror(errno.ELOOP)}. Choose another path.")
    return target


def refuse_existing(path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Raise an OSError for a file that `whole_file` could not write, or that exists without `overwrite`."""
    target = resolved(path)
    with _naming(path):
        clean_up(target.parent, target)
        if target.is_dir():
            raise IsADirectoryError(f"{path} must be a file, but it is a folder. Name a file inside it.")
        if os.path.lexists(target) and not overwrite:
            raise FileExistsError(f"{path} already exists. Choose another name, or replace it with overwrite.")
        _try_to_write(target.parent, target)


def refuse_nonempty(path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Raise an OSError for a folder to which files cannot be written, or that is not empty without `overwrite`."""
    target = resolved(path)
    with _naming(path):
        for home in (target.parent, target):
            clean_up(home, target)
        if os.path.lexists(target) and not target.is_dir():
            raise FileExistsError(f"{path} must be a folder, but it is a file. Choose another path.")
        if entries(target) and not overwrite:
            raise FileExistsError(f"{path} is a folder that is not empty. Choose another, or allow it with overwrite.")
        _try_to_write(target, target)


def refuse_replacement(path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Raise an OSError for a folder that `whole_folder` could not write.

    Even with `overwrite`, a folder that is not empty is refused if it is not a model (it has no `config.json`), or
    contains the working directory. A folder that another process has `reserved` is refused in any case.
    """
    refuse_nonempty(path, overwrite)
    target = resolved(path)
    leftovers = [name for home in (target.parent, target) for name in temporaries(home, target)]
    if any(is_locked(name) for name in leftovers if name not in OURS):
        raise FileExistsError(
            f"{path} is reserved by another run, which will save a model there. Choose another folder, or wait for it."
        )
    if not entries(target):
        return
    if not (target / CONFIG).is_file():
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
    refuse_nonempty(path, overwrite=True)  # first, since this undoes a replacement that was killed
    target = resolved(path)
    if entries(target) and not (target / PROGRESS_NAME).is_file():
        raise FileExistsError(
            f"{path} is a folder that is not empty, and no interrupted run left it. Choose another, or empty it."
        )


def refuse_full(path: str | os.PathLike[str], size: int) -> None:
    """Raise an OSError for a path on a disk with less than `size` bytes of free space."""
    free = shutil.disk_usage(existing_parent(path)).free
    if free < size:
        raise OSError(f"{path} needs {megabytes(size)}, but {megabytes(free)} are free on its disk. Free some space.")


def megabytes(size: int) -> str:
    """Return a number of bytes in words."""
    return f"{size / 1e6:,.2f} MB"


def files_in(folder: str | os.PathLike[str]) -> list[str]:
    """Return the names of the files of a model in a folder, relative to it and with slashes."""
    root = resolved(folder)
    return sorted(
        file.relative_to(root).as_posix()
        for entry in entries(root)
        for file in (entry, *entry.rglob("*"))
        if file.is_file() and file.name not in (PROGRESS_NAME, ROW_WEIGHTS_NAME)
    )


def existing_parent(path: str | os.PathLike[str]) -> Path:
    """Return the path itself or its nearest parent that exists."""
    target = resolved(path)
    return next(place for place in (target, *target.parents) if os.path.lexists(place))


def _try_to_write(folder: Path, target: Path) -> None:
    """Raise the error of the operating system for a name that is too long, or a place that cannot be written to."""
    place = existing_parent(folder)
    limit = os.pathconf(place, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
    if any(len(os.fsencode(part)) > limit for part in target.parts):
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    if not place.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{place} is a file, not a folder")
    probe = temporary_name(place, folder)  # permissions and quotas show only when something is created
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


def is_replaceable(path: str | os.PathLike[str], overwrite: bool = False) -> bool:
    """Whether `whole_folder` could write a folder: `refuse_replacement` does not refuse its content."""
    try:
        refuse_replacement(path, overwrite)
    except FileExistsError:
        return False
    return True
