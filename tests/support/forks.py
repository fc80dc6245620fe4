"""Calls in processes that cost little: forks of one process that has imported the libraries and the commands.

A fresh interpreter needs 4 to 8 CPU seconds to import them. Use one only where that is what a test is about.
"""

import multiprocessing
import os
import sys
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory

import pytest
from jaxtyping import install_import_hook

# For tests that fork: each worker of xdist would start a process of its own that imports the libraries.
IN_ONE_WORKER = pytest.mark.xdist_group("forks")
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "torch",
        "lightning",
        "transformers",
        "timm",
        "datasets",
        "peft",
        "PIL.Image",
        "wanda_lightning.cli.run_job",
    ]
)


def run(function, *arguments, timeout=120):
    """Call a function of a module, with arguments that can be pickled; return its exit status, output and errors."""
    with TemporaryDirectory() as folder:
        process = FORKS.Process(target=_call, args=(function, arguments, folder), daemon=True)
        process.start()
        process.join(timeout)
        ended = not process.is_alive()
        process.kill()
        process.join()
        output, errors = (Path(folder, name).read_text() for name in ("1", "2"))
        assert ended, f"{function} did not end in {timeout} s: {output[-5000:]} {errors[-5000:]}"
        return CompletedProcess([], process.exitcode, output, errors)


def execute(code, *arguments):
    """Be `python -c CODE ARGUMENTS`: a function to call in a fork."""
    sys.argv = ["-c", *map(str, arguments)]
    exec(compile(code, "-c", "exec"), {"__name__": "__main__"})


def run_tests(folder, *arguments):
    """Be `python -m pytest ARGUMENTS` in a folder: a function to call in a fork."""
    check_shapes()
    os.chdir(folder)
    sys.exit(pytest.main([*map(str, arguments)]))


def check_shapes():
    """Let what is imported later check the shapes of tensors; this process has the package without these checks."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "wanda_lightning"]:
        del sys.modules[name]
    install_import_hook("wanda_lightning.core", "beartype.beartype")


def _call(function, arguments, folder):
    import torch

    for descriptor in (1, 2):
        os.dup2(os.open(f"{folder}/{descriptor}", os.O_CREAT | os.O_WRONLY), descriptor)
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", 1, closefd=False) for descriptor in (1, 2))
    torch.set_num_threads(1)
    function(*arguments)
