"""Prune one model in several processes: collectives, and FSDP2."""

from wanda_lightning.parallel.fsdp import entry_point, fsdp_calls_checked, is_sharded, reshard
from wanda_lightning.parallel.processes import SINGLE_PROCESS, Processes, local, zero_counts

__all__ = [
    "SINGLE_PROCESS",
    "Processes",
    "entry_point",
    "fsdp_calls_checked",
    "is_sharded",
    "local",
    "reshard",
    "zero_counts",
]
