"""Lightning callbacks that prune a model, keep its zeros during training, distill it, and save it."""

from wanda_lightning.callbacks.distillation import DistillFromDense
from wanda_lightning.callbacks.pruning import PruningCallback, WandaPrune
from wanda_lightning.callbacks.save import BestAfterPruning, SavePretrained
from wanda_lightning.callbacks.schedules import CubicSchedule, LinearSchedule, OneShot, Schedule
from wanda_lightning.callbacks.zeros import KeepZeros

__all__ = [
    "BestAfterPruning",
    "CubicSchedule",
    "DistillFromDense",
    "KeepZeros",
    "LinearSchedule",
    "OneShot",
    "PruningCallback",
    "SavePretrained",
    "Schedule",
    "WandaPrune",
]
