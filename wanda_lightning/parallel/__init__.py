"""Collectives for pruning in several processes, and models that FSDP2 shards, which are trained and saved."""

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
from wanda_lightning.parallel.summed_statistics import (
    all_reduce_statistics as all_reduce_statistics,
)
