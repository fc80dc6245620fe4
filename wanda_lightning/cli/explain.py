"""Distinguish refusals, which are meant for the user, from faults, and print both."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from wanda_lightning.common.errors import UserError


class UsageError(UserError):
    """A wrong option. The command ends with status 2."""


@contextmanager
def as_usage_errors() -> Iterator[None]:
    """Turn errors that are meant for the user into a `UsageError`, while only options are checked."""
    try:
        yield
    except (UserError, OSError) as error:
        raise UsageError(str(error)) from error


def refusal_in(error: BaseException) -> BaseException | None:
    """Return the error that is meant for the user, which is this one or one of its causes; None for a fault.

    Meant for the user are `UserError`, errors of the operating system, and Lightning's `MisconfigurationException`.
    Causes count because LightningCLI wraps errors of classes.
    """
    if isinstance(error, UserError | OSError) or type(error).__name__ == "MisconfigurationException":
        return error
    return None if error.__cause__ is None else refusal_in(error.__cause__)


def explain(error: BaseException, debug: bool) -> int:
    """Print a refusal in one line, or the traceback of a fault (of any error with `debug`); return the exit status."""
    refusal = refusal_in(error)
    out_of_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's
    if refusal is not None:
        message = str(refusal) or type(refusal).__name__
    elif out_of_memory:
        cause = str(error).splitlines()[0] if str(error) else "of the host"
        message = f"memory ran out ({cause}). Use smaller batches, fewer samples or shorter windows."
    else:
        message = (
            "internal error in wanda_lightning or in a library that it uses. Please open an issue with the command and "
            "the lines above."
        )
    if debug or not (refusal or out_of_memory):
        traceback.print_exception(error)
    print(f"wanda-lightning: error: {message}", file=sys.stderr)
    if refusal is not None and not debug:
        for note in getattr(error, "__notes__", ()):
            print(note, file=sys.stderr)
    return 2 if isinstance(refusal, UsageError) else 1
