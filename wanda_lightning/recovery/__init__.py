"""Recoveries: train the kept weights after pruning, with fixed masks; correct BatchNorm statistics."""

from wanda_lightning.recovery.base import DenseModel, ModelRecovery, NoRecovery, RecoveredPart, Recovery, UnitRecovery
from wanda_lightning.recovery.batch_norm import BatchNormStatistics, batch_norm_layers
from wanda_lightning.recovery.distil import Distil
from wanda_lightning.recovery.reconstruct import Reconstruct

__all__ = [
    "BatchNormStatistics",
    "DenseModel",
    "Distil",
    "ModelRecovery",
    "NoRecovery",
    "Reconstruct",
    "RecoveredPart",
    "Recovery",
    "UnitRecovery",
    "batch_norm_layers",
]
