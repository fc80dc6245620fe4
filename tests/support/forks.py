"""Processes that cost little: forks of one process that has imported the libraries and the commands.

A fresh interpreter needs 4 to 8 CPU seconds to import them. Use one only where that is what a test is about: imports,
or environment variables that a library reads when it is imported.
"""

import multiprocessing
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from subprocess import CompletedProcess

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        *("torch", "lightning", "transformers", "timm", "datasets", "peft", "PIL.Image"),
        "wanda_lightning.cli.pruning",
    ]
)


class Fork:
    """A running call of a function of a module in a process of its own, whose output is in `stdout` and `stderr`.

    The arguments are pickled, and the module is imported in the fork unless it is preloaded. `cwd` and `env`, with all
    environment variables, are those of this process by default; some libraries have read theirs already.
    """

    def __init__(self, function, *arguments, cwd=None, env=None):
        pipes = [FORKS.Pipe(duplex=False) for _ in range(2)]
        place = os.fspath(cwd or os.getcwd()), dict(os.environ if env is None else env)
        self._process = FORKS.Process(
            target=_call, args=(function, arguments, place, [there for _, there in pipes]), daemon=True
        )
        self._process.start()
        self.pid = self._process.pid
        self.stdout, self.stderr = (os.fdopen(os.dup(here.fileno()), errors="replace") for here, _ in pipes)
        for here, there in pipes:
            here.close()
            there.close()

    def send_signal(self, number):
        """Send a signal; nothing happens if the process has ended."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, timeout=120):
        """Return the exit status (minus the number of a signal that killed it) and what was not read of its output."""
        with ThreadPoolExecutor(2) as pool:
            texts = [pool.submit(stream.read) for stream in (self.stdout, self.stderr) if not stream.closed]
            self._process.join(timeout)
            is_late = self._process.is_alive()
            self._process.kill()
            self._process.join()
        assert not is_late, f"the fork did not end in {timeout} s: {[text.result() for text in texts]}"
        *out, err = (text.result() for text in texts)
        for stream in (self.stdout, self.stderr):
            stream.close()
        return CompletedProcess([], self._process.exitcode, "".join(out), err)


def run(function, *arguments, **place):
    """Call a function in a fork; return exit status, output and errors. Raising `SystemExit` sets the status."""
    return Fork(function, *arguments, **place).wait()


def shell(*arguments):
    """Be the command line: the target of a `Fork`."""
    from wanda_lightning.cli import main

    sys.argv = ["wanda-lightning", *arguments]
    sys.exit(main())


def execute(code, *arguments):
    """Be `python -c CODE ARGUMENTS`: the target of a `Fork`."""
    sys.argv = ["-c", *map(str, arguments)]
    exec(compile(code, "-c", "exec"), {"__name__": "__main__"})


def _call(function, arguments, place, pipes):
    import torch

    folder, environment = place
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for descriptor, pipe in enumerate(pipes, start=1):
        os.dup2(pipe.fileno(), descriptor)
        pipe.close()
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", 1, closefd=False) for descriptor in (1, 2))
    torch.set_num_threads(1)
    function(*arguments)
