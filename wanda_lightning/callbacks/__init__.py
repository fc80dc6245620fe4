"""Lightning callbacks that prune a model, keep its zeros during training, distill it, and save it."""

from wanda_lightning.callbacks.distillation import DistillFromDense as DistillFromDense
from wanda_lightning.callbacks.pruning import (
    PruningCallback as PruningCallback,
    WandaPrune as WandaPrune,
)
from wanda_lightning.callbacks.save import (
    BestAfterPruning as BestAfterPruning,
    SavePretrained as SavePretrained,
)
from wanda_lightning.callbacks.schedules import (
    CubicSchedule as CubicSchedule,
    LinearSchedule as LinearSchedule,
    OneShot as OneShot,
    Schedule as Schedule,
)
from wanda_lightning.callbacks.shrinking import ShrinkCallback as ShrinkCallback
from wanda_lightning.callbacks.zeros import KeepZeros as KeepZeros
