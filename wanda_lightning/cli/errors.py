"""Distinguish refusals, which are meant for the user, from faults, and print them in the terms of the command line."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import fields

from wanda_lightning.cli.options import FLAGS, EvaluateOptions, PruneOptions
from wanda_lightning.cli.parser import UsageError
from wanda_lightning.common.errors import UserError

_OPTIONS = {
    **{field.name: field.name for command in (PruneOptions, EvaluateOptions) for field in fields(command)},
    **FLAGS,
    "checkpoint": "resume",
    "data": "data_path",
    "evaluation": "eval",
    "lr": "lr",
    "num_samples": "nsamples",
}
_NAMES = "|".join(_OPTIONS)
_KEYWORD = re.compile(rf"(?<![\w.])({_NAMES})=('[^']*'|\"[^\"]*\"|\[[^\]]*\]|\.\.\.|[\w:.*+-]*[\w*])?")
_SUBJECT = re.compile(rf"^({_NAMES})(?= must | should )")


def refusal_in(error: BaseException) -> BaseException | None:
    """Return the error that is meant for the user, which is this one or one of its causes; None for a fault.

    Meant for the user are `UserError`, errors of the operating system, and Lightning's `MisconfigurationException`.
    Causes count because LightningCLI wraps errors of classes.
    """
    found: BaseException | None = error
    while found is not None and not _is_refusal(found):
        found = found.__cause__
    return found


def _is_refusal(error: BaseException) -> bool:
    return isinstance(error, UserError | OSError) or type(error).__name__ == "MisconfigurationException"


@contextmanager
def usage_errors() -> Iterator[None]:
    """Turn refusals into `UsageError`s while options are checked before a model is loaded."""
    try:
        yield
    except (UserError, OSError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(str(error)) from error


def in_options(message: str, known: Collection[str] = frozenset(_OPTIONS.values())) -> str:
    """Replace Python's keywords by the known options.

    >>> in_options("num_samples must be at least 1, but it is 0. Use skip=['a', 'b'] or overwrite=True.")
    '--nsamples must be at least 1, but it is 0. Use --skip a,b or --overwrite.'
    """

    def option(found: re.Match[str]) -> str:
        if _OPTIONS[found[1]] not in known:
            return found[0]
        value = found[2] or ""
        if value.startswith("["):
            value = ",".join(re.findall(r"'([^']*)'", value))
        value = value.strip("'\"")
        return f"--{_OPTIONS[found[1]]}" + (f" {value}" if value and value != "True" else "")

    message = re.sub(r"NM\(n=(\d+), m=(\d+)\)", r"\1:\2", message)
    subject = _SUBJECT.match(message)
    if subject and _OPTIONS[subject[1]] in known:
        message = f"--{_OPTIONS[subject[1]]}{message[subject.end() :]}"
    return _KEYWORD.sub(option, message)


def explain(error: BaseException, debug: bool, options: Collection[str]) -> int:
    """Print a refusal in one line, or the traceback of a fault (of any error with `debug`), and return the exit status.

    `options` are those of the command, which replace Python's keywords; there are none for a recipe.
    """
    refusal = refusal_in(error)
    out_of_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's
    if refusal is not None:
        message = in_options(str(refusal) or type(refusal).__name__, options)
    elif out_of_memory:
        cause = str(error).splitlines()[0] if str(error) else "of the host"
        message = f"memory ran out ({cause}). Use a smaller --batch_size, --nsamples or --seqlen."
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
