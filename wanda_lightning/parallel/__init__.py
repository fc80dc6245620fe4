"""Prune one model in several processes: collectives, and FSDP2."""

from wanda_lightning.parallel.fsdp import (
    gathered_state_dict as gathered_state_dict,
    is_sharded as is_sharded,
    reshard as reshard,
    shard_processes as shard_processes,
)
from wanda_lightning.parallel.processes import (
    SINGLE_PROCESS as SINGLE_PROCESS,
    Processes as Processes,
    first_index as first_index,
    local as local,
)
