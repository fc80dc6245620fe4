"""Two real processes that run functions together, over gloo on the CPU; started once for many tests."""

import os
import tempfile

from support.forks import FORKS, check_shapes

SIZE = 2
PATIENCE = 150.0  # seconds; longer than a loaded machine takes to import torch in each process


class Pair:
    """Two processes of one process group, which start with the first call."""

    def __init__(self):
        self._processes = []
        self._connections = []

    def run(self, function, *args, **kwargs):
        """Call `function(rank, *args, **kwargs)` in both, and return both results or raise what went wrong."""
        if not self._processes:
            self._start()
        try:
            for connection in self._connections:
                connection.send((function, args, kwargs))
            results = [self._receive(connection) for connection in self._connections]
        except BaseException:
            self.end()  # the process group may be in the middle of something
            raise
        return results

    def end(self):
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self.__init__()

    def _start(self):
        meeting = f"{tempfile.mkdtemp()}/meeting"
        for rank in range(SIZE):
            ours, theirs = FORKS.Pipe()
            process = FORKS.Process(target=_serve, args=(rank, meeting, theirs), daemon=True)
            process.start()
            theirs.close()  # that a process has ended is seen at the end of its connection
            self._processes.append(process)
            self._connections.append(ours)

    def _receive(self, connection):
        if not connection.poll(PATIENCE):
            raise TimeoutError(f"no result after {PATIENCE:g} s")
        result, error = connection.recv()
        if error is not None:
            raise error
        return result


def _serve(rank, meeting, connection):
    _join(rank, meeting)
    while True:
        function, args, kwargs = connection.recv()
        try:
            answer = (function(rank, *args, **kwargs), None)
        except Exception as error:
            answer = (None, error)
        connection.send(answer)


def _join(rank, meeting):
    import torch

    check_shapes()
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
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=SIZE
    )
