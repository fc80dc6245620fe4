"""The command `wanda-lightning`.

Neither torch nor a model library is imported before the options are known, so that help and refusals appear at once.
"""

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from typing import Any

from cyclopts import CycloptsError

from wanda_lightning.cli.commands import LIGHTNING, app
from wanda_lightning.cli.options import values_of
from wanda_lightning.common.aliases import Kwargs
from wanda_lightning.common.busy_machine import OPENMP_WAITING
from wanda_lightning.common.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line with these arguments, by default those of the shell, and return the exit status.

    It is 0; 2 if what the user asked for cannot be done; 130 after Ctrl-C; 1 for faults, and if memory runs out.
    """
    # Threads that spin long while they wait take the cores from other work: OpenMP reads this when torch is imported.
    if OPENMP_WAITING.isdisjoint(os.environ):
        os.environ["GOMP_SPINCOUNT"] = "2000"  # the OpenMP of GCC
        os.environ["KMP_BLOCKTIME"] = "0"  # that of LLVM and Intel
    if not os.isatty(2):
        os.environ.setdefault("TQDM_DISABLE", "1")  # no bars of libraries in log files

    arguments = list(sys.argv[1:] if argv is None else argv)
    wants_help = not {"--help", "-h"}.isdisjoint(arguments)
    try:
        if arguments and arguments[0] in LIGHTNING and not wants_help:
            _run_lightning(arguments)
        else:
            _run(arguments)
    except KeyboardInterrupt:
        print("wanda-lightning: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        return explain(error, "--debug" in arguments)
    return 0


def parse_options(command: str, arguments: Sequence[str]) -> Kwargs:
    """Return the options of a command by name; raise a `UserError`."""
    _, groups = parse([command, *arguments])
    groups.pop("session", None)
    return values_of(*groups.values())


def parse(arguments: Sequence[str]) -> tuple[Callable[..., None], Kwargs]:
    """Return the function of a command, and its groups of options by name; raise a `UserError`."""
    try:
        function, bound, _ = app.parse_args(arguments, print_error=False, exit_on_error=False)
    except CycloptsError as error:
        error.verbose = False  # the message without the place in this package
        message = str(error)
        if isinstance(error.__cause__, UserError) and error.argument:
            message = f"{error.argument.name}: {error.__cause__}"
        elif message.endswith('%" into float.'):
            message += " Give a fraction, such as 0.5 for 50%."
        raise UserError(message) from error

    bound.apply_defaults()
    for name, value in values_of(*filter(is_dataclass, bound.arguments.values())).items():
        if value == "":  # such as "$UNSET" in a script
            raise UserError(f"--{name} must not be empty. Leave it out, or give a value.")
    return function, bound.arguments


def _run(arguments: list[str]) -> None:
    """Run a command, or print its options as a file; run the help or the version, which have no session."""
    function, groups = parse(arguments)
    session = groups.pop("session", None)
    if session is not None and session.print_config:
        import yaml

        print(yaml.safe_dump(values_of(*groups.values()), sort_keys=False), end="")
        return
    set_up_warnings()
    function(**groups)


def _run_lightning(arguments: list[str]) -> None:
    from wanda_lightning.cli.lightning import run

    set_up_warnings()
    # LightningCLI reads sys.argv, and so do the processes that its strategies start.
    sys.argv[1:] = [word.replace("--help_all", "--help") for word in arguments if word != "--debug"]
    run()


def set_up_warnings() -> None:
    """Print each warning on one line without the source path, and hide what users can do nothing about."""
    import logging

    warnings.formatwarning = _one_line
    # Lightning 2.6 calls torch 2.13 in a deprecated way at every dataloader.
    warnings.filterwarnings(
        "ignore", message=r".*isinstance\(treespec, LeafSpec\)", category=FutureWarning
    )
    # torchao, if it is installed, warns about kernels for other devices; sentence-transformers about the meta device.
    for name in ("torchao", "torch.utils._pytree", "sentence_transformers.base.model"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _one_line(message: Any, *_: object, **__: object) -> str:
    return f"wanda-lightning: warning: {message}\n"


def refusal_in(error: BaseException) -> BaseException | None:
    """Return the error that is meant for the user, which is this one or one of its causes; None for a fault.

    Meant for the user are `UserError`, errors of the operating system, and Lightning's `MisconfigurationException`.
    Causes count because LightningCLI wraps errors of classes.
    """
    # UnicodeDecodeError: a file is not UTF-8.
    if isinstance(error, UserError | OSError | UnicodeDecodeError):
        return error
    # Known by name or text, without an import: Lightning's class, and the errors of Rust libraries for a full disk.
    if type(error).__name__ == "MisconfigurationException" or "(os error " in str(error):
        return error
    return refusal_in(error.__cause__) if error.__cause__ else None


def explain(error: BaseException, debug: bool) -> int:
    """Print a refusal in one line, or the traceback of a fault (of any error with `debug`); return the exit status."""
    refusal = refusal_in(error)
    out_of_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if debug or not (refusal or out_of_memory):
        traceback.print_exception(error)

    if refusal:
        message = str(refusal) or type(refusal).__name__
    elif out_of_memory:
        # The other lines of torch's message describe its allocator.
        cause = str(error).partition("\n")[0] or "of the host"
        message = (
            f"memory ran out ({cause}). Use smaller batches, fewer samples or shorter windows."
        )
    else:
        message = "internal error. Please open an issue with the command and the lines above."
    print(f"wanda-lightning: error: {message}", file=sys.stderr)

    if not refusal:
        return 1
    if not debug:  # else they are in the traceback
        for note in getattr(error, "__notes__", ()):
            print(note, file=sys.stderr)
    return 2
