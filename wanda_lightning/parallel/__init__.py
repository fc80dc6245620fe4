"""Prune one model in several processes: collectives, and FSDP2."""

from wanda_lightning.parallel.fsdp import (
    entry_point,
    free,
    fsdp_calls_checked,
    gathered_state_dict,
    gathering_noticed,
    is_sharded,
    kept_gathered,
    managers_around,
    reshard,
    shard_processes,
)
from wanda_lightning.parallel.processes import SINGLE_PROCESS, Processes, first_index, local, zero_counts

__all__ = [
    "SINGLE_PROCESS",
    "Processes",
    "entry_point",
    "first_index",
    "free",
    "fsdp_calls_checked",
    "gathered_state_dict",
    "gathering_noticed",
    "is_sharded",
    "kept_gathered",
    "local",
    "managers_around",
    "reshard",
    "shard_processes",
    "zero_counts",
]
