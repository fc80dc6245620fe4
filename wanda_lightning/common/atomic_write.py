"""Write files and folders that appear as a whole or not at all, and refuse places that cannot be written."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

TEMPORARY = (
    ".wanda-"  # start of temporary names; a killed run may leave some, perhaps with the new model
)


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path to write to; the file replaces `path` if the body ends without an error."""
    target = resolve_path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    new = target.parent / _temporary(target)
    try:
        yield new
        _flush(new)
        os.replace(new, target)
        _flush(target.parent)
    finally:
        new.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder to fill; its files replace those in `path` if the body ends without an error.

    They are on the disk before the first old one is deleted. If they cannot be moved, or the place is taken meanwhile,
    the error names the temporary folder, which stays. `path` may be a mount point.
    """
    require_writable(path, overwrite)
    target = resolve_path(path)
    new = (target if target.is_dir() else target.parent) / _temporary(target)
    new.mkdir(parents=True)
    try:
        yield new
        for entry in (*new.rglob("*"), new):
            _flush(entry)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    try:
        require_writable(path, overwrite)
        target.mkdir(exist_ok=True)
        for entry in sorted(
            list_entries(target),
            key=lambda entry: (entry.name != "config.json", entry.name[0] == "."),
        ):
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        move_entries(new, target)
    except OSError as error:
        raise OSError(
            f"{path} cannot be completed, but the files that it lacks are in {new}. {error}"
        ) from error


def move_entries(source: Path, target: Path) -> None:
    """Move the entries of a folder into another one: `config.json` last, since a folder without it is not a model."""
    for entry in sorted(source.iterdir(), key=lambda entry: entry.name == "config.json"):
        _flush(entry)
        if entry.is_dir():
            shutil.rmtree(target / entry.name, ignore_errors=True)
        os.replace(entry, target / entry.name)
    source.rmdir()
    _flush(target)


def _temporary(target: Path) -> str:
    return f"{TEMPORARY}{uuid4().hex[:8]}-{target.name[-40:]}"  # with the suffix, which some libraries read


def _flush(path: Path) -> None:
    """Write a file, or the names in a folder, from the cache of the operating system to the disk."""
    with suppress(*[OSError] * path.is_dir()):  # some systems cannot flush a folder
        descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def resolve_path(path: str | os.PathLike[str]) -> Path:
    """Return the absolute path, without symbolic links and `~`."""
    return Path(os.path.realpath(os.path.expanduser(path)))


def list_entries(folder: Path) -> list[Path]:
    """List a folder, if it exists, without temporary names."""
    return [
        each
        for each in (folder.iterdir() if folder.is_dir() else ())
        if not each.name.startswith(TEMPORARY)
    ]


def require_writable(
    path: str | os.PathLike[str], overwrite: bool = False, kind: str = "model"
) -> None:
    """Raise an OSError for a place where a "model", files of a "folder", or a "file" cannot be written.

    A place that is taken needs `overwrite`. Even then, a model replaces nothing but a model.
    """
    target = resolve_path(path)
    with suppress(FileNotFoundError):
        target.stat()  # fails if a name is too long, a parent is a file, or links form a loop
    entries = list_entries(target)
    is_file = kind == "file"
    place = next(each for each in (target, *target.parents) if each.is_dir())
    try:
        tempfile.TemporaryFile(dir=place).close()  # some reasons show only when a file is created
    except OSError as error:
        raise OSError(
            f"{path} cannot be written, since {place} takes no new files ({error.strerror}). Choose another path."
        ) from error
    if target.exists() and target.is_dir() == is_file:
        raise FileExistsError(
            f"{path} must be a {'file' if is_file else 'folder'}. Choose another path."
        )
    if (entries or target.is_file()) and not overwrite:
        raise FileExistsError(
            f"{path} exists and is not empty. Choose another path, or allow it with overwrite."
        )
    here = Path.cwd().is_relative_to(target)
    if kind == "model" and entries and (here or target / "config.json" not in entries):
        raise FileExistsError(
            f"{path} must be empty or a model (with config.json, not the working directory), since it is replaced."
        )
