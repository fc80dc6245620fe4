"""The command `wanda-lightning`.

Only the standard library is imported before the command is known, so that help, refusals and Ctrl-C respond at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from os.path import exists
from signal import SIGINT, SIGTERM
from typing import TYPE_CHECKING, Any

from wanda_lightning.cli.explain import UsageError, as_usage_errors, explain

if TYPE_CHECKING:
    from wanda_lightning.cli.signals import Signals

COMMANDS = {
    "prune": "Prune a language model or an image classifier, and measure it before and after.",
    "shrink": "Take out the hidden units that are zero, as prune --pattern structured leaves them, and save the rest.",
    "finetune": "Fine-tune a pruned language model without losing a zero, and measure it before and after.",
    "evaluate": "Measure models side by side: perplexity and zero-shot tasks, or accuracy on images; and sparsity.",
    "inspect": "Show what prune would prune, what not, and why. No weight is loaded.",
}
LIGHTNING_COMMANDS = ("fit", "validate", "test", "predict")

_COMMANDS = "".join(f"  {name:<11} {description}\n" for name, description in COMMANDS.items())
_USAGE = f"""\
usage: wanda-lightning COMMAND [--help] [--config FILE.yaml] [--print_config] [--debug] [options]
       wanda-lightning --version

commands:
{_COMMANDS}\
  fit, validate, test, predict
              Run the Lightning Trainer on a YAML recipe (see recipes/), with pruning as a callback. Options such as
              --trainer.max_epochs 3 replace those of the recipe; --help_all lists them, which takes some seconds.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line with these arguments, by default those of the shell, and return the exit status.

    It is 0; 2 for a wrong option that is found before data or a model is loaded; 1 for any other error; 128 plus the
    number of the signal that ended the command (130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP); 141 if the
    output was closed before its end.
    """
    signals = None
    try:
        from wanda_lightning.cli.signals import Signals
        from wanda_lightning.cli.streams import tolerant_streams

        arguments = list(sys.argv[1:] if argv is None else argv)
        # In fit and its relatives, the Trainer itself handles SIGTERM, at the end of a step, as schedulers expect.
        names = ("SIGINT",) if arguments[:1] and arguments[0] in LIGHTNING_COMMANDS else ("SIGINT", "SIGTERM", "SIGHUP")
        signals = Signals(names)
        with tolerant_streams() as streams, signals:
            status = _run(arguments, signals, in_shell=argv is None)
    except KeyboardInterrupt:  # before the command began, or after it ended
        print("wanda-lightning: interrupted", file=sys.stderr)
        return 128 + (signals.received if signals and signals.received else SIGINT)
    return 141 if status == 0 and any(stream.is_broken for stream in streams) else status


def parse_options(command: str, arguments: Sequence[str]) -> Any:
    """Return the options of a command as a dataclass; raise a `UsageError`."""
    from wanda_lightning.cli.options import OPTIONS
    from wanda_lightning.cli.parser import CommandParser

    return CommandParser(command, OPTIONS[command], COMMANDS[command]).parse_options(arguments)


def _run(arguments: list[str], signals: Signals, in_shell: bool) -> int:
    """Run one command; if it ends early, say why in one line."""
    command = arguments[0] if arguments else "--help"
    try:
        if sys.flags.optimize > 1 and command in (*COMMANDS, *LIGHTNING_COMMANDS):  # nor would options have help
            raise UsageError(
                "python -OO removes the docstrings that transformers reads to define its models, so no model can be "
                "loaded. Use python -O, or python without the option."
            )
        if command in COMMANDS:
            _run_command(command, arguments[1:])
        elif command in LIGHTNING_COMMANDS:
            _run_lightning([argument for argument in arguments if argument != "--debug"], in_shell)
        else:
            _show(command)
    except SystemExit as stop:
        if type(stop).__name__ == "SIGTERMException":  # of the Trainer, which leaves the status to us
            return 128 + SIGTERM
        if signals.received is None:  # else the Trainer turned Ctrl-C into exit(1)
            return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException as error:
        if signals.received is None:
            return explain(error, "--debug" in arguments)
        for note in getattr(error, "__notes__", ()):
            print(note, file=sys.stderr)
    if signals.received is None:
        return 0
    what = "interrupted" if signals.received.name == "SIGINT" else f"ended by {signals.received.name}"
    print(f"wanda-lightning: {what}. Unfinished files were removed.", file=sys.stderr)
    return 128 + signals.received


def _show(command: str) -> None:
    from wanda_lightning.common.words import did_you_mean

    if command in ("-h", "--help"):
        print(_USAGE, end="")
    elif command == "--version":
        from importlib.metadata import version

        print(f"wanda_lightning {version('wanda_lightning')}")
    else:
        known = (*COMMANDS, *LIGHTNING_COMMANDS)
        raise UsageError(f"There is no command {command!r}.{did_you_mean(command, known)}")


def _run_command(command: str, arguments: list[str]) -> None:
    with as_usage_errors():
        options = parse_options(command, arguments)
        options.refuse_early()
    from wanda_lightning.cli.output import quiet_libraries, readable_warnings

    quiet_libraries()
    module = import_module(f"wanda_lightning.cli.{command}")
    with readable_warnings():
        module.run(options)


def _run_lightning(arguments: list[str], in_shell: bool) -> None:
    if "--help" in arguments or "-h" in arguments:
        print(_USAGE, end="")
        return
    _refuse_missing_recipe(arguments)
    from wanda_lightning.cli.lightning import run
    from wanda_lightning.cli.output import readable_warnings

    arguments = ["--help" if argument == "--help_all" else argument for argument in arguments]
    with readable_warnings():
        if in_shell:  # LightningCLI reads sys.argv, and so do the processes that its strategies start
            sys.argv[1:] = arguments
        run(None if in_shell else arguments)


def _refuse_missing_recipe(arguments: list[str]) -> None:
    command, *options = arguments
    if not options:
        raise UsageError(f"--config FILE.yaml is required for {command}: a recipe such as those in recipes/.")
    for option, value in zip(options, [*options[1:], ""], strict=True):
        name, _, path = option.partition("=") if option.startswith("--config=") else (option, "", value)
        if name in ("-c", "--config") and path.endswith((".yaml", ".yml")) and not exists(path):
            raise UsageError(f"--config must be a YAML file, but {path} does not exist. Check the path.")
