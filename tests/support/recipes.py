"""Scripts of recipes/ as modules, whose commands run in this process, which is faster."""

import contextlib
import importlib.util
import sys
from pathlib import Path

from wanda_lightning import cli

RECIPES = Path(__file__).parents[2] / "recipes"


def script(path):
    """Import a script by its path in recipes/."""
    spec = importlib.util.spec_from_file_location(path.replace("/", "_"), RECIPES / f"{path}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def in_this_process(command, output):
    """Take the place of a script's `launch`."""
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        return cli.main(list(command))
