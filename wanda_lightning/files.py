"""Files and folders that appear whole or not at all: written beside their place, then renamed into it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


def _sibling(target: Path) -> Path:
    """A new hidden name in the same folder, so that a rename never crosses a file system; it keeps the suffix."""
    return target.with_name(f".{uuid4().hex[:8]}.{target.name}")


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path to write to; it takes the place of `path` when the body ends without an error.

    Args:
        path: The file to write. An existing file is replaced; missing parent folders are made.

    Raises:
        IsADirectoryError: If `path` is a folder.
    """
    refuse_existing(path, overwrite=True)
    target = Path(path).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    new = _sibling(target)
    try:
        yield new
        os.replace(new, target)
    finally:
        new.unlink(missing_ok=True)


def refuse_existing(path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Say at once that a file would not be written here, before hours of work lead up to it.

    Raises:
        IsADirectoryError: If `path` is a folder.
        FileExistsError: If there is such a file (without `overwrite`).
    """
    target = Path(path).resolve()
    if target.is_dir():
        raise IsADirectoryError(f"A file was to be written to {path}, which is a folder. Name a file inside it.")
    if target.exists() and not overwrite:
        raise FileExistsError(
            f"The file {path} exists. Choose another name, or allow its replacement (overwrite=True, --overwrite)."
        )


def refuse_nonempty(path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Say at once that files would not be written here, before hours of work lead up to them.

    Raises:
        FileExistsError: If `path` is a file, or a folder that is not empty (without `overwrite`).
    """
    target = Path(path).resolve()
    if not target.exists():
        return
    if not target.is_dir():
        raise FileExistsError(f"A folder was to be written to {path}, which is a file. Choose another path.")
    if any(target.iterdir()) and not overwrite:
        raise FileExistsError(
            f"The folder {path} is not empty. Choose another one, or allow it (overwrite=True, --overwrite)."
        )


def refuse_replacement(path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Say at once that `whole_folder` would refuse to write a model here.

    Raises:
        FileExistsError: As `refuse_nonempty`; and for a folder, not empty, that is no model (it has no `config.json`)
            or holds the working directory.
    """
    refuse_nonempty(path, overwrite)
    target = Path(path).resolve()
    if not target.exists():
        return
    if any(target.iterdir()) and not (target / "config.json").is_file():
        raise FileExistsError(
            f"Overwriting {path} would delete what is in it, which is no model (it has no config.json). "
            "Choose another folder, or empty this one."
        )
    if Path.cwd().is_relative_to(target):
        raise FileExistsError(
            f"Writing {path} would replace a folder that holds the working directory. Choose a folder inside it."
        )


@contextmanager
def whole_folder(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder to fill; it takes the place of `path` when the body ends without an error.

    Args:
        path: The folder to write. Missing parent folders are made.
        overwrite: Replace a model's folder, with everything in it. The old one is deleted only after the new one has
            taken its place.

    Raises:
        FileExistsError: As `refuse_replacement` does, before anything is written.
    """
    refuse_replacement(path, overwrite)
    target = Path(path).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    new = _sibling(target)
    new.mkdir()
    try:
        yield new
        if overwrite and target.exists():
            _swap(new, target)
        else:
            if target.exists():
                target.rmdir()  # Windows does not rename onto an empty folder; a folder filled meanwhile is refused.
            os.replace(new, target)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _swap(new: Path, target: Path) -> None:
    old = _sibling(target)
    os.replace(target, old)
    try:
        os.replace(new, target)
    except BaseException:
        os.replace(old, target)
        raise
    shutil.rmtree(old)
