"""Two real processes that run functions together, over gloo on the CPU; started once for many tests."""

import os
import sys
import tempfile
import traceback
from contextlib import suppress
from pathlib import Path

from support.forks import FORKS

SIZE = 2
PATIENCE = 150.0  # seconds; longer than a loaded machine takes to import torch in each process


class Pair:
    """Two processes of one process group. `run` gives what the function gave in each, or the exception's text."""

    def __init__(self):
        self._processes = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._end()

    def run(self, function, *args, **kwargs):
        """Call `function(rank, *args, **kwargs)` in both, and return both results or raise what went wrong."""
        if not self._processes:
            self._start()
        for connection in self._connections:
            connection.send((function, args, kwargs))
        results = []
        for rank, connection in enumerate(self._connections):
            if not connection.poll(PATIENCE):
                self._end()
                raise TimeoutError(f"process {rank} hangs in {function.__name__}")
            try:
                results.append(connection.recv())
            except EOFError as error:
                self._end()
                raise RuntimeError(f"process {rank} died in {function.__name__}") from error
        failures = [text for failed, text in results if failed]
        if failures:
            self._end()  # its process group may be in the middle of something
            raise RuntimeError("\n".join(failures))
        return [result for _, result in results]

    def _start(self):
        meeting = Path(tempfile.mkdtemp()) / "meeting"
        pipes = [FORKS.Pipe() for _ in range(SIZE)]
        self._connections = [ours for ours, _ in pipes]
        self._processes = [
            FORKS.Process(target=_work, args=(rank, str(meeting), theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self._processes:
            process.start()

    def _end(self):
        for process in self._processes:
            process.kill()
            process.join()
        self._processes = []


def _work(rank, meeting, connection):
    import torch
    from jaxtyping import install_import_hook

    for name in [name for name in sys.modules if name.partition(".")[0] == "wanda_lightning"]:
        del sys.modules[name]  # imported before the fork, without the hook
    install_import_hook("wanda_lightning.core", "beartype.beartype")

    os.environ |= {  # to Lightning this is a process that torchrun has started
        "TORCHELASTIC_RUN_ID": "pair",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(SIZE),
        "LOCAL_WORLD_SIZE": str(SIZE),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=SIZE)
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            function, args, kwargs = connection.recv()
            try:
                answer = False, function(rank, *args, **kwargs)
            except BaseException:
                answer = True, f"process {rank}: {traceback.format_exc()}"
            connection.send(answer)
            sys.stdout.flush()
