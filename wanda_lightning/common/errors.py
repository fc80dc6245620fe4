"""Errors that the user can mend, as distinct from faults of this package."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Something that the user asked for cannot be done; the message says what was found and what to do."""


class MissingPackageError(UserError, ImportError):
    """An optional package is missing; the message says how to install it."""


@contextmanager
def naming_full_disk(path: str | os.PathLike[str]) -> Iterator[None]:
    """Name the path if the disk is full, which safetensors and tokenizers say with classes of their own."""
    try:
        yield
    except Exception as error:
        if re.search(r"(os error |Errno )(27|28)\b", str(error)) is None:  # EFBIG and ENOSPC
            raise
        raise OSError(f"{path} cannot be written: {error}") from error
