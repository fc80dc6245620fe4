"""Recoveries: train the kept weights after pruning, with fixed masks."""

from wanda_lightning.recovery.base import ModelRecovery, NoRecovery, RecoveredPart, Recovery, UnitRecovery
from wanda_lightning.recovery.distil import Distil
from wanda_lightning.recovery.reconstruct import Reconstruct

__all__ = [
    "Distil",
    "ModelRecovery",
    "NoRecovery",
    "Reconstruct",
    "RecoveredPart",
    "Recovery",
    "UnitRecovery",
]
