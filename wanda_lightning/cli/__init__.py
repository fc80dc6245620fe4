"""The command `wanda-lightning`."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Sequence

from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException

from wanda_lightning.cli.evaluate_command import evaluate_models
from wanda_lightning.cli.finetune_command import finetune_model
from wanda_lightning.cli.inspect_command import inspect_model
from wanda_lightning.cli.lightning_command import SUBCOMMANDS, run_lightning
from wanda_lightning.cli.prune_command import prune_model

_COMMANDS: dict[str, Callable[..., None]] = {
    "prune": prune_model,
    "finetune": finetune_model,
    "evaluate": evaluate_models,
    "inspect": inspect_model,
}
_FLAGS = ("use_variant", "eval_zero_shot", "overwrite", "trust_remote_code")  # given by name alone

_USAGE = """\
usage: wanda-lightning COMMAND [--help] [--config FILE.yaml] [--print_config] [options]

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

    Returns:
        The exit status: 0; 1 for an error that is explained in one message; 2 for wrong usage; 130 after Ctrl-C.
    """
    # Lightning 2.6 asks torch 2.13 in an old way, at every dataloader.
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)", category=FutureWarning)
    # peft 0.21 asks transformers 5.24 in an old way, at every model that gets adapters.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(_USAGE, end="")
        return 0
    if command not in (*_COMMANDS, *SUBCOMMANDS):
        print(f"{_USAGE}wanda-lightning: error: there is no command {command!r}", file=sys.stderr)
        return 2
    try:
        if command in SUBCOMMANDS:
            run_lightning(argv)
        else:
            _run(command, arguments[1:])
    except KeyboardInterrupt:
        return _interrupted()
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # the Trainer turns Ctrl-C into exit(1)
            return _interrupted()
        raise
    except (ValueError, OSError, ImportError, MisconfigurationException) as error:
        print(f"wanda-lightning: error: {error}", file=sys.stderr)
        for note in getattr(error, "__notes__", ()):
            print(note, file=sys.stderr)
        return 1
    return 0


def command_parser(command: str, exit_on_error: bool = True) -> ArgumentParser:
    """The parser of `wanda-lightning prune`, `finetune`, `evaluate` or `inspect`.

    Args:
        command: The name of one.
        exit_on_error: End the process on wrong usage; else raise `argparse.ArgumentError`.
    """
    function = _COMMANDS[command]
    parser = ArgumentParser(
        prog=f"wanda-lightning {command}",
        description=(function.__doc__ or "").splitlines()[0],
        allow_abbrev=False,
        exit_on_error=exit_on_error,
    )
    parser.add_argument("--config", action="config", help="Read options from a YAML file.")
    flags = [flag for flag in _FLAGS if flag in function.__annotations__]
    parser.add_function_arguments(function, as_group=False, skip=set(flags))
    for name in flags:
        parser.add_argument(f"--{name}", action="store_true", help=_FLAG_HELP[name])
    return parser


def _run(command: str, arguments: Sequence[str]) -> None:
    function = _COMMANDS[command]
    values = command_parser(command).parse_args(list(arguments))
    function(**{name: values[name] for name in inspect.signature(function).parameters})


_FLAG_HELP = {
    "use_variant": "Let rows differ in sparsity: each loses the same share of its score (the paper's variant).",
    "eval_zero_shot": "Measure the pruned model on the paper's seven zero-shot tasks, too (needs lm-eval).",
    "overwrite": "Add to a --save folder that is not empty; replace a --save file, or a --save_model folder and all "
    "that is in it.",
    "trust_remote_code": "Run the code that comes with a hub model.",
}


def _interrupted() -> int:
    print("wanda-lightning: interrupted; what was not written whole is not there", file=sys.stderr)
    return 130
