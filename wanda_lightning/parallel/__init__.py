"""Prune one model in several processes: collectives, and FSDP2."""

from wanda_lightning.parallel.fsdp import ForwardOrderCheck, entry_point, is_sharded, reset_fsdp_on_exit, reshard
from wanda_lightning.parallel.processes import SINGLE_PROCESS, Processes, local, zero_counts

__all__ = [
    "SINGLE_PROCESS",
    "ForwardOrderCheck",
    "Processes",
    "entry_point",
    "is_sharded",
    "local",
    "reset_fsdp_on_exit",
    "reshard",
    "zero_counts",
]
