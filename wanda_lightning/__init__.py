"""One-shot pruning for PyTorch Lightning, Hugging Face and timm models.

Public names are imported on first use (PEP 562), so that `import wanda_lightning` loads neither torch nor a model
library.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from wanda_lightning.acceleration import accelerate_2to4 as accelerate_2to4
    from wanda_lightning.callbacks import BestAfterPruning as BestAfterPruning
    from wanda_lightning.callbacks import CubicSchedule as CubicSchedule
    from wanda_lightning.callbacks import DistillFromDense as DistillFromDense
    from wanda_lightning.callbacks import KeepZeros as KeepZeros
    from wanda_lightning.callbacks import LinearSchedule as LinearSchedule
    from wanda_lightning.callbacks import MagnitudePrune as MagnitudePrune
    from wanda_lightning.callbacks import OneShot as OneShot
    from wanda_lightning.callbacks import PruningCallback as PruningCallback
    from wanda_lightning.callbacks import SavePretrained as SavePretrained
    from wanda_lightning.callbacks import Schedule as Schedule
    from wanda_lightning.callbacks import SparseGPTPrune as SparseGPTPrune
    from wanda_lightning.callbacks import WandaPrune as WandaPrune
    from wanda_lightning.config import PruningConfig as PruningConfig
    from wanda_lightning.core.allocation import OWL as OWL
    from wanda_lightning.core.allocation import AlphaPruning as AlphaPruning
    from wanda_lightning.core.allocation import Fisher as Fisher
    from wanda_lightning.core.allocation import PerLayer as PerLayer
    from wanda_lightning.core.allocation import Uniform as Uniform
    from wanda_lightning.core.criteria import RIA as RIA
    from wanda_lightning.core.criteria import Magnitude as Magnitude
    from wanda_lightning.core.criteria import Wanda as Wanda
    from wanda_lightning.core.expert_pattern import Experts as Experts
    from wanda_lightning.core.patterns import NM as NM
    from wanda_lightning.core.patterns import EqualShare as EqualShare
    from wanda_lightning.core.patterns import Structured as Structured
    from wanda_lightning.core.patterns import Unstructured as Unstructured
    from wanda_lightning.core.permutation import Assignment as Assignment
    from wanda_lightning.core.permutation import NoPermutation as NoPermutation
    from wanda_lightning.core.solvers import ADMM as ADMM
    from wanda_lightning.core.solvers import Refit as Refit
    from wanda_lightning.core.solvers import SparseGPT as SparseGPT
    from wanda_lightning.core.solvers import ZeroOut as ZeroOut
    from wanda_lightning.data import ImageDataModule as ImageDataModule
    from wanda_lightning.data import TextDataModule as TextDataModule
    from wanda_lightning.data import sample_windows as sample_windows
    from wanda_lightning.engine.prune import prune as prune
    from wanda_lightning.modules import CausalLMModule as CausalLMModule
    from wanda_lightning.modules import ImageClassifierModule as ImageClassifierModule
    from wanda_lightning.report import PruningReport as PruningReport
    from wanda_lightning.shrinking import Shrunk as Shrunk
    from wanda_lightning.shrinking import shrink as shrink
    from wanda_lightning.streaming import perplexity_from_disk as perplexity_from_disk
    from wanda_lightning.streaming import prune_from_disk as prune_from_disk
    from wanda_lightning.streaming import shrink_from_disk as shrink_from_disk
    from wanda_lightning.training import Distil as Distil
    from wanda_lightning.training import NoRecovery as NoRecovery
    from wanda_lightning.training import Reconstruct as Reconstruct
    from wanda_lightning.training.held_zeros import keep_zeros as keep_zeros

_HOMES = {
    "acceleration": "accelerate_2to4",
    "callbacks": (
        "BestAfterPruning CubicSchedule DistillFromDense KeepZeros LinearSchedule MagnitudePrune OneShot "
        "PruningCallback SavePretrained Schedule SparseGPTPrune WandaPrune"
    ),
    "config": "PruningConfig",
    "core.allocation": "AlphaPruning Fisher OWL PerLayer Uniform",
    "core.criteria": "Magnitude RIA Wanda",
    "core.expert_pattern": "Experts",
    "core.patterns": "EqualShare NM Structured Unstructured",
    "core.permutation": "Assignment NoPermutation",
    "core.solvers": "ADMM Refit SparseGPT ZeroOut",
    "data": "ImageDataModule TextDataModule sample_windows",
    "modules": "CausalLMModule ImageClassifierModule",
    "engine.prune": "prune",
    "training": "Distil NoRecovery Reconstruct",
    "report": "PruningReport",
    "shrinking": "Shrunk shrink",
    "streaming": "perplexity_from_disk prune_from_disk shrink_from_disk",
    "training.held_zeros": "keep_zeros",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}


__all__ = sorted(_HOME_OF)

if not TYPE_CHECKING:  # a type checker would accept every name

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            value = import_module("importlib.metadata").version(__name__)
        elif name in _HOME_OF:
            value = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
