"""Train with zeros that stay zero: in any training loop, and to recover what pruning has cost."""

from wanda_lightning.training.distil import Distil
from wanda_lightning.training.reconstruct import Reconstruct
from wanda_lightning.training.recovery import (
    DenseModel,
    ModelRecovery,
    NoRecovery,
    Recovery,
    UnitRecovery,
)

__all__ = [
    "DenseModel",
    "Distil",
    "ModelRecovery",
    "NoRecovery",
    "Reconstruct",
    "Recovery",
    "UnitRecovery",
]
