"""Train with zeros that stay zero: in any training loop, and to recover what pruning has cost."""

from wanda_lightning.training.distill import Distill as Distill
from wanda_lightning.training.reconstruct import Reconstruct as Reconstruct
from wanda_lightning.training.recovery import (
    BlockRecovery as BlockRecovery,
    DenseModel as DenseModel,
    ModelRecovery as ModelRecovery,
    NoRecovery as NoRecovery,
    Recovery as Recovery,
)
