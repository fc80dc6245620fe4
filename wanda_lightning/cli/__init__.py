"""The command `wanda-lightning`.

Neither torch nor a model library is imported before the options are known, so that help and refusals appear at once.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from typing import Any

from cyclopts import CycloptsError

from wanda_lightning.cli.commands import LIGHTNING, app
from wanda_lightning.cli.parsing import values_of
from wanda_lightning.common.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line with these arguments, by default those of the shell, and return the exit status.

    It is 0; 2 if what the user asked for cannot be done; 130 after Ctrl-C; 1 for faults, and if memory runs out.
    """
    # Threads that spin while they wait take the cores from other work: OpenMP reads this when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] and arguments[0] in LIGHTNING and not {"--help", "-h"} & {*arguments}:
            _run_lightning([each for each in arguments if each != "--debug"], in_shell=argv is None)
        else:
            _run(arguments)
    except KeyboardInterrupt:
        print("wanda-lightning: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        return explain(error, "--debug" in arguments)
    return 0


def parse_options(command: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Return the options of a command by name; raise a `UserError`."""
    _, groups = parse([command, *arguments])
    return values_of(*(group for name, group in groups.items() if name != "session"))


def _run(arguments: list[str]) -> None:
    function, groups = parse(arguments)
    session = groups.pop("session", None)
    if session is None:  # help, or the version
        function(**groups)
        return
    if session.print_config:
        import yaml

        options = values_of(*groups.values())
        lists = {name: list(value) for name, value in options.items() if isinstance(value, tuple)}
        print(yaml.safe_dump(options | lists, sort_keys=False), end="")
        return
    from wanda_lightning.cli.output import readable_output

    with readable_output():
        function(**groups)


def parse(arguments: Sequence[str]) -> tuple[Callable[..., None], dict[str, Any]]:
    """Return the function of a command, and its groups of options by name; raise a `UserError`."""
    try:
        function, bound, _ = app.parse_args(arguments, print_error=False, exit_on_error=False)
    except CycloptsError as error:
        error.verbose = False  # the message without the place in this package
        raise UserError(str(error)) from error
    bound.apply_defaults()
    for name, value in values_of(*filter(is_dataclass, bound.arguments.values())).items():
        if value == "":  # such as "$UNSET" in a script
            raise UserError(f"--{name} must not be empty. Leave it out, or give a value.")
    return function, bound.arguments


def _run_lightning(arguments: list[str], in_shell: bool) -> None:
    if len(arguments) == 1:
        raise UserError("--config FILE.yaml is required: a recipe such as those in recipes/.")
    from wanda_lightning.cli.lightning import run
    from wanda_lightning.cli.output import readable_output

    arguments = ["--help" if argument == "--help_all" else argument for argument in arguments]
    with readable_output():
        if in_shell:  # LightningCLI reads sys.argv, and so do the processes that its strategies start
            sys.argv[1:] = arguments
        run(None if in_shell else arguments)


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
    is_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's
    if refusal is not None:
        message = str(refusal) or type(refusal).__name__
    elif is_memory:
        cause = str(error).partition("\n")[0] or "of the host"
        message = f"memory ran out ({cause}). Use smaller batches, fewer samples or shorter windows."
    else:
        message = (
            "internal error in wanda_lightning or in a library that it uses. Please open an issue with the command and "
            "the lines above."
        )
    if debug or not (refusal or is_memory):
        traceback.print_exception(error)
    print(f"wanda-lightning: error: {message}", file=sys.stderr)
    if refusal is not None and not debug:
        for note in getattr(error, "__notes__", ()):
            print(note, file=sys.stderr)
    return 1 if refusal is None else 2
