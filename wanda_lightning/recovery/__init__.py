"""Recoveries: train the kept weights after pruning, with fixed masks."""

from wanda_lightning.recovery.base import NoRecovery, RecoveredPart, Recovery, UnitRecovery
from wanda_lightning.recovery.reconstruct import Reconstruct

__all__ = ["NoRecovery", "Reconstruct", "RecoveredPart", "Recovery", "UnitRecovery"]
