"""Tell the refusals, which are meant for the user, from faults; and say them in the words of the command line."""

from __future__ import annotations

import os
import re
import sys
import traceback
from dataclasses import fields
from opcode import opmap

import wanda_lightning
from wanda_lightning.cli.options import EvaluateOptions, PruneOptions

_PACKAGE = os.path.dirname(os.path.abspath(wanda_lightning.__file__)) + os.sep
_FOR_USERS = (ValueError, TypeError, OSError, ImportError)
_OPTIONS = {field.name: field.name for command in (PruneOptions, EvaluateOptions) for field in fields(command)} | {
    "checkpoint": "resume",
    "data": "data_path",
    "evaluation": "eval",
    "lr": "lr",
    "method": "prune_method",
    "num_samples": "nsamples",
    "pattern": "sparsity_type",
    "sparsity": "sparsity_ratio",
}
_NAMES = "|".join(_OPTIONS)
_KEYWORD = re.compile(rf"(?<![\w.])({_NAMES})=('[^']*'|\"[^\"]*\"|\[[^\]]*\]|\.\.\.|[\w:.*+-]*[\w*])?")
_SUBJECT = re.compile(rf"^({_NAMES})(?= must | should )")


def refusal_in(error: BaseException) -> BaseException | None:
    """The error that is meant for the user: this one or one of its causes; None if it is a fault.

    Meant for the user are: errors of the operating system about a file, Lightning's `MisconfigurationException`, and
    errors that a `raise` statement of this package raised. An error of the same class that a library or an operation
    raised (a failed unpacking, `int("x")`) is a fault. LightningCLI wraps what a class refuses, hence the causes.
    """
    found: BaseException | None = error
    while found is not None and not _is_refusal(found):
        found = found.__cause__
    return found


def _is_refusal(error: BaseException) -> bool:
    if type(error).__name__ == "MisconfigurationException" or (isinstance(error, OSError) and error.errno is not None):
        return True
    frames = error.__traceback__
    if not isinstance(error, _FOR_USERS) or frames is None:
        return False
    while frames.tb_next is not None:
        frames = frames.tb_next
    code = frames.tb_frame.f_code
    return code.co_filename.startswith(_PACKAGE) and code.co_code[frames.tb_lasti] == opmap["RAISE_VARARGS"]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of the host or of an accelerator ran out."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def in_options(message: str) -> str:
    """Replace Python's keywords by the options of the commands.

    >>> in_options("num_samples must be at least 1, but it is 0. Use skip=['a', 'b'] or overwrite=True.")
    '--nsamples must be at least 1, but it is 0. Use --skip a,b or --overwrite.'
    """

    def option(found: re.Match[str]) -> str:
        value = found[2] or ""
        if value.startswith("["):
            value = ",".join(re.findall(r"'([^']*)'", value))
        value = value.strip("'\"")
        return f"--{_OPTIONS[found[1]]}" + (f" {value}" if value and value != "True" else "")

    message = re.sub(r"NM\(n=(\d+), m=(\d+)\)", r"\1:\2", message)
    return _KEYWORD.sub(option, _SUBJECT.sub(lambda found: f"--{_OPTIONS[found[1]]}", message))


def explain(error: BaseException, debug: bool, translate: bool) -> None:
    """Print one line for a refusal, else the traceback and a request to report it.

    Args:
        error: What ended the command.
        debug: Print the traceback in any case.
        translate: Name options as the command line does.
    """
    refusal = refusal_in(error)
    if debug or not (refusal or is_out_of_memory(error)):
        traceback.print_exception(error)
    if refusal is not None:
        message = str(refusal) or type(refusal).__name__
        print(f"wanda-lightning: error: {in_options(message) if translate else message}", file=sys.stderr)
        if not debug:
            for note in getattr(error, "__notes__", ()):
                print(note, file=sys.stderr)
    elif is_out_of_memory(error):
        print(
            f"wanda-lightning: error: memory ran out ({str(error).splitlines()[0] if str(error) else 'of the host'}). "
            "Use a smaller --batch_size, --nsamples or --seqlen.",
            file=sys.stderr,
        )
    else:
        print(
            "wanda-lightning: error: this is a fault of wanda_lightning or of a library that it uses. Please report "
            "it with the command and the lines above.",
            file=sys.stderr,
        )
