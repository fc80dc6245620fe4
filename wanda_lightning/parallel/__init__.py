"""Prune one model in several processes: collectives, and FSDP2."""

from wanda_lightning.parallel.fsdp import (
    entry_point,
    free,
    fsdp_calls_checked,
    is_sharded,
    managers_around,
    reshard,
)
from wanda_lightning.parallel.processes import SINGLE_PROCESS, Processes, local, zero_counts

__all__ = [
    "SINGLE_PROCESS",
    "Processes",
    "entry_point",
    "free",
    "fsdp_calls_checked",
    "is_sharded",
    "local",
    "managers_around",
    "reshard",
    "zero_counts",
]
