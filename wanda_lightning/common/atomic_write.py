"""Write files and folders that appear as a whole or not at all, and refuse places that cannot be written."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from wanda_lightning.common.errors import naming_full_disk

TEMPORARY = ".wanda-"  # start of temporary names; a killed run may leave some, which can be deleted


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path to write to; the file replaces `path` if the body ends without an error."""
    target = resolve_path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    new = _temporary(target.parent, target)
    try:
        with naming_full_disk(path):
            yield new
        _flush(new)
        os.replace(new, target)
        _flush(target.parent)
    finally:
        new.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder to fill; it replaces `path` if the body ends without an error.

    An empty folder may be a mount point or the working directory, so it is filled and not replaced. If the place is
    taken meanwhile, the error names the temporary folder, which stays.
    """
    require_writable(path, overwrite)
    target = resolve_path(path)
    is_empty = target.is_dir() and not list_entries(target)
    new, old = _temporary(target if is_empty else target.parent, target), _temporary(target.parent, target)
    new.mkdir(parents=True)
    try:
        with naming_full_disk(path):
            yield new
        for entry in (*new.rglob("*"), new):
            _flush(entry)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    try:
        require_writable(path, overwrite)
        if is_empty:
            move_entries(new, target)
        else:
            if target.exists():
                os.replace(target, old)
            os.replace(new, target)
            _flush(target.parent)
    except OSError as error:
        kept = f", and the one that it replaces is {old}" if old.exists() else ""
        raise OSError(f"{path} cannot be written, but the complete folder is {new}{kept}. {error}") from error
    shutil.rmtree(old, ignore_errors=True)


def move_entries(source: Path, target: Path) -> None:
    """Move the entries of a folder into another one: `config.json` last, since a folder without it is not a model."""
    for entry in sorted(source.iterdir(), key=lambda entry: entry.name == "config.json"):
        _flush(entry)
        if entry.is_dir():
            shutil.rmtree(target / entry.name, ignore_errors=True)
        os.replace(entry, target / entry.name)
    source.rmdir()
    _flush(target)


def _temporary(home: Path, target: Path) -> Path:
    return home / f"{TEMPORARY}{uuid4().hex[:8]}-{target.name[-40:]}"  # with the suffix, which some libraries read


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
    return [each for each in (folder.iterdir() if folder.is_dir() else ()) if not each.name.startswith(TEMPORARY)]


def require_writable(path: str | os.PathLike[str], overwrite: bool = False, kind: str = "model") -> None:
    """Raise an OSError for a place where a "model", files of a "folder", or a "file" cannot be written.

    A place that is taken needs `overwrite`. Even then, a model replaces nothing but a model.
    """
    target = resolve_path(path)
    with suppress(FileNotFoundError):
        target.stat()  # fails if a name is too long, a parent is a file, or links form a loop
    entries = list_entries(target)
    is_replaced = kind == "model" and bool(entries)
    place = next(each for each in (target, *target.parents) if each.is_dir() and not (each == target and is_replaced))
    tempfile.TemporaryFile(dir=place).close()  # some reasons show only when a file is created
    if target.exists() and target.is_dir() == (kind == "file"):
        raise FileExistsError(f"{path} must be a {'file' if kind == 'file' else 'folder'}. Choose another path.")
    if (entries or target.is_file()) and not overwrite:
        raise FileExistsError(f"{path} exists and is not empty. Choose another path, or allow it with overwrite.")
    if is_replaced and (target / "config.json" not in entries or Path.cwd().is_relative_to(target)):
        raise FileExistsError(
            f"{path} must be empty or a model (with config.json, not the working directory), since it is replaced as a "
            "whole. Choose another folder, or empty it."
        )
