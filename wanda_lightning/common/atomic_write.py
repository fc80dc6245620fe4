"""Write files and folders that appear as a whole or not at all, and refuse places that cannot be written."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from wanda_lightning.common.aliases import StrPath

TEMPORARY = ".wanda-"
"""The start of temporary names. A killed run may leave some, perhaps with the new model."""


@contextmanager
def atomic_write(path: StrPath) -> Iterator[Path]:
    """Yield a temporary path to write to; the file replaces `path` if the body ends without an error."""
    target = resolve_path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    new = target.parent / _temporary(target)
    try:
        yield new
        _flush(new)
        os.replace(new, target)
        _flush(target.parent)  # which holds the name
    finally:
        new.unlink(missing_ok=True)


def write_text(path: StrPath, text: str) -> None:
    """Write a text file that appears as a whole or not at all."""
    with atomic_write(path) as new:
        new.write_text(text, encoding="utf-8")


@contextmanager
def atomic_folder(path: StrPath, overwrite: bool = False) -> Iterator[Path]:
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
        # Again: another program may have written there meanwhile.
        require_writable(path, overwrite)
        target.mkdir(exist_ok=True)
        _delete_entries(target)
        move_entries(new, target)
    except OSError as error:
        raise OSError(
            f"{path} cannot be completed, but the files that it lacks are in {new}. {error}"
        ) from error


def _delete_entries(folder: Path) -> None:
    """Delete the entries of a folder, except temporary ones: `config.json` first, hidden ones last."""
    # Without config.json, a folder with some files of a model is not a model that could be loaded.
    entries = list_entries(folder)
    entries.sort(key=lambda entry: (entry.name != "config.json", entry.name.startswith(".")))
    for entry in entries:
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


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
    # It ends like the final name, since some libraries choose the format by the suffix.
    return f"{TEMPORARY}{uuid4().hex[:8]}-{target.name[-40:]}"


def _flush(path: Path) -> None:
    """Write a file, or the names in a folder, from the cache of the operating system to the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError:
        if not path.is_dir():  # some systems cannot flush a folder
            raise


def resolve_path(path: StrPath) -> Path:
    """Return the absolute path, without symbolic links and `~`."""
    return Path(os.path.realpath(os.path.expanduser(path)))


def list_entries(folder: Path) -> list[Path]:
    """List a folder, if it exists, without temporary names."""
    if not folder.is_dir():
        return []
    return [entry for entry in folder.iterdir() if not entry.name.startswith(TEMPORARY)]


def require_writable(path: StrPath, overwrite: bool = False, kind: str = "model") -> None:
    """Raise an OSError for a place where a "model", files of a "folder", or a "file" cannot be written.

    A place that is taken needs `overwrite`. Even then, a model replaces nothing but a model.
    """
    target = resolve_path(path)
    with suppress(FileNotFoundError):
        target.stat()  # fails if a name is too long, a parent is a file, or links form a loop
    place = next(folder for folder in (target, *target.parents) if folder.is_dir())
    try:
        tempfile.TemporaryFile(dir=place).close()  # some reasons show only when a file is created
    except OSError as error:
        raise OSError(
            f"{path} cannot be written, since {place} takes no new files ({error.strerror}). Choose another path."
        ) from error

    expects_file = kind == "file"
    if target.exists() and target.is_dir() == expects_file:
        expected = "file" if expects_file else "folder"
        raise FileExistsError(f"{path} must be a {expected}. Choose another path.")
    entries = list_entries(target)
    if (entries or target.is_file()) and not overwrite:
        raise FileExistsError(
            f"{path} exists and is not empty. Choose another path, or replace it with overwrite=True (in the shell, "
            "--overwrite)."
        )

    # Everything in the folder of a model is deleted, so it must not be a folder with other work.
    is_model = target / "config.json" in entries and not Path.cwd().is_relative_to(target)
    if kind == "model" and entries and not is_model:
        raise FileExistsError(
            f"{path} must be empty or a model (with config.json, not the working directory), since it is replaced."
        )
