"""Two real processes that run functions together, over gloo on the CPU; started once for many tests."""

import os
import tempfile

from support.forks import FORKS, check_shapes

SIZE = 2
PATIENCE = 150.0  # seconds; longer than a loaded machine takes to import torch in each process


class Pair:
    """Two processes of one process group, which start with the first call."""

    def __init__(self):
        self._pools = []

    def run(self, function, *args, **kwargs):
        """Call `function(rank, *args, **kwargs)` in both, and return both results or raise what went wrong."""
        if not self._pools:
            meeting = f"{tempfile.mkdtemp()}/meeting"
            self._pools = [FORKS.Pool(1, _join, (rank, meeting)) for rank in range(SIZE)]
        calls = [
            pool.apply_async(function, (rank, *args), kwargs)
            for rank, pool in enumerate(self._pools)
        ]
        try:
            return [call.get(PATIENCE) for call in calls]
        except BaseException:
            self.end()  # the process group may be in the middle of something
            raise

    def end(self):
        for pool in self._pools:
            pool.terminate()
        self._pools = []


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
