"""Lightning callbacks that prune a model, keep or move its zeros during training, distill it, and save it."""

from wanda_lightning.callbacks.distillation import DistillFromDense
from wanda_lightning.callbacks.keep_zeros import KeepZeros
from wanda_lightning.callbacks.learn_masks import LearnMasks
from wanda_lightning.callbacks.pruning import MagnitudePrune, PruningCallback, SparseGPTPrune, WandaPrune
from wanda_lightning.callbacks.rigl import RigL
from wanda_lightning.callbacks.save import SavePretrained
from wanda_lightning.callbacks.schedules import CubicSchedule, LinearSchedule, OneShot, Schedule

__all__ = [
    "CubicSchedule",
    "DistillFromDense",
    "KeepZeros",
    "LearnMasks",
    "LinearSchedule",
    "MagnitudePrune",
    "OneShot",
    "PruningCallback",
    "RigL",
    "SavePretrained",
    "Schedule",
    "SparseGPTPrune",
    "WandaPrune",
]
