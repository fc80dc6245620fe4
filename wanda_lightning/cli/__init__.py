"""The command `wanda-lightning`.

This file imports nothing but the standard library until it knows what to do, so that help, refusals and Ctrl-C answer
at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wanda_lightning.cli.parser import CommandParser
    from wanda_lightning.cli.signals import Signals

COMMANDS = {
    "prune": ("PruneOptions", "Prune a language model or an image classifier, and measure it before and after."),
    "finetune": ("FinetuneOptions", "Fine-tune a pruned language model without losing a zero, and measure it."),
    "evaluate": (
        "EvaluateOptions",
        "Measure models side by side: perplexity and zero-shot tasks, or accuracy on images; and their sparsity.",
    ),
    "inspect": ("InspectOptions", "Show what would be pruned, what not, and why; no weight is loaded."),
}
LIGHTNING_COMMANDS = ("fit", "validate", "test", "predict")

_USAGE = """\
usage: wanda-lightning COMMAND [--help] [--config FILE.yaml] [--print_config] [--debug] [options]
       wanda-lightning --version

commands:
  prune       prune a language model or an image classifier, and measure it before and after
  finetune    train a pruned language model without losing a zero, and measure it before and after
  evaluate    measure models side by side: perplexity, zero-shot tasks, accuracy on images, sparsity
  inspect     show what would be pruned, what not, and why; reads the configuration alone
  fit, validate, test, predict
              run the Lightning Trainer on a YAML recipe, with pruning as a callback
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments; None reads those of the shell.

    Returns:
        The exit status: 0; 1 for an error; 2 for wrong usage; 128 plus the number of the signal that ended the command
        (130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP); 141 if the output was closed before its end.
    """
    try:
        from wanda_lightning.cli.signals import Signals
        from wanda_lightning.cli.streams import tolerant_streams

        arguments = list(sys.argv[1:] if argv is None else argv)
        # The Trainer ends fit and its relatives on SIGTERM itself, at the end of a step, as schedulers expect.
        names = ("SIGINT",) if arguments[:1] and arguments[0] in LIGHTNING_COMMANDS else ("SIGINT", "SIGTERM", "SIGHUP")
        with tolerant_streams() as streams, Signals(names) as signals:
            status = _run(arguments, signals, in_shell=argv is None)
    except KeyboardInterrupt:
        print("wanda-lightning: interrupted", file=sys.stderr)
        return 130
    return 141 if status == 0 and any(stream.is_broken for stream in streams) else status


def command_parser(command: str) -> CommandParser[Any]:
    """The parser of `wanda-lightning prune`, `finetune`, `evaluate` or `inspect`; it raises `UsageError`."""
    from wanda_lightning.cli import options
    from wanda_lightning.cli.parser import CommandParser

    name, description = COMMANDS[command]
    return CommandParser(command, getattr(options, name), description)


def _run(arguments: list[str], signals: Signals, in_shell: bool) -> int:
    """Run one command; say in one line why it ended early."""
    from wanda_lightning.cli.errors import explain
    from wanda_lightning.cli.parser import UsageError

    command = arguments[0] if arguments else "--help"
    try:
        if command in COMMANDS:
            _run_command(command, arguments[1:])
        elif command in LIGHTNING_COMMANDS:
            _run_lightning([argument for argument in arguments if argument != "--debug"], in_shell)
        else:
            _say(command)
    except UsageError as error:
        print(f"wanda-lightning: error: {error}", file=sys.stderr)
        return 2
    except SystemExit as stop:
        if signals.received is None:  # else the Trainer turned Ctrl-C into exit(1)
            return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException as error:
        if signals.received is None:
            explain(error, "--debug" in arguments, translate=command in COMMANDS)
            return 1
        for note in getattr(error, "__notes__", ()):
            print(note, file=sys.stderr)
    if signals.received is None:
        return 0
    what = "interrupted" if signals.received.name == "SIGINT" else f"ended by {signals.received.name}"
    print(f"wanda-lightning: {what}. Files that were not finished are not there.", file=sys.stderr)
    return 128 + signals.received


def _say(command: str) -> None:
    from wanda_lightning.cli.parser import UsageError
    from wanda_lightning.core.name_patterns import did_you_mean

    if command in ("-h", "--help"):
        print(_USAGE, end="")
    elif command == "--version":
        from importlib.metadata import version

        print(f"wanda_lightning {version('wanda_lightning')}")
    else:
        known = (*COMMANDS, *LIGHTNING_COMMANDS)
        raise UsageError(f"there is no command {command!r}.{did_you_mean(command, known)}")


def _run_command(command: str, arguments: list[str]) -> None:
    from importlib import import_module

    options = command_parser(command).parse_args(arguments)
    _refuse_without_docstrings()
    options.refuse_early()
    module = import_module(f"wanda_lightning.cli.{command}")
    from wanda_lightning.cli.measure import readable_messages

    with readable_messages():
        module.run(options)


def _run_lightning(arguments: list[str], in_shell: bool) -> None:
    _refuse_without_docstrings()
    _refuse_missing_recipe(arguments)
    from wanda_lightning.cli.lightning import run
    from wanda_lightning.cli.measure import readable_messages

    with readable_messages():
        if in_shell:  # LightningCLI reads sys.argv, and so do the processes that its strategies start
            sys.argv[1:] = arguments
        run(None if in_shell else arguments)


def _refuse_without_docstrings() -> None:
    """Refuse `python -OO`, under which transformers cannot import its models."""
    if sys.flags.optimize > 1:
        raise ValueError(
            "python -OO removes the docstrings that transformers reads to define its models, so no model can be loaded."
            " Use python -O, or python without the option."
        )


def _refuse_missing_recipe(arguments: list[str]) -> None:
    """Refuse a recipe that does not exist before Lightning is imported."""
    from os.path import exists

    from wanda_lightning.cli.parser import UsageError

    for option, value in zip(arguments, [*arguments[1:], ""], strict=True):
        name, _, path = option.partition("=") if option.startswith("--config=") else (option, "", value)
        if name in ("-c", "--config") and path.endswith((".yaml", ".yml")) and not exists(path):
            raise UsageError(f"--config must be a YAML file, but {path} does not exist. Check the path.")
