"""One-shot pruning for PyTorch Lightning, Hugging Face and timm models.

Public names are imported on first use (PEP 562), so that `import wanda_lightning` loads neither torch nor a model
library.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from wanda_lightning.callbacks import (
        BestAfterPruning as BestAfterPruning,
        CubicSchedule as CubicSchedule,
        DistillFromDense as DistillFromDense,
        KeepZeros as KeepZeros,
        LinearSchedule as LinearSchedule,
        OneShot as OneShot,
        PruningCallback as PruningCallback,
        SavePretrained as SavePretrained,
        Schedule as Schedule,
        WandaPrune as WandaPrune,
    )
    from wanda_lightning.callbacks.prunable_module import PrunableModule as PrunableModule
    from wanda_lightning.common.errors import UserError as UserError
    from wanda_lightning.config import PruningConfig as PruningConfig
    from wanda_lightning.core.allocation import (
        OWL as OWL,
        Allocation as Allocation,
        DenseLayer as DenseLayer,
        Fisher as Fisher,
        PerLayer as PerLayer,
        Uniform as Uniform,
        match_target as match_target,
    )
    from wanda_lightning.core.criteria import (
        RIA as RIA,
        Criterion as Criterion,
        Magnitude as Magnitude,
        Wanda as Wanda,
    )
    from wanda_lightning.core.patterns import (
        NM as NM,
        EqualShare as EqualShare,
        Experts as Experts,
        Pattern as Pattern,
        Structured as Structured,
        Unstructured as Unstructured,
    )
    from wanda_lightning.core.selection import Selection as Selection
    from wanda_lightning.core.solvers import (
        ADMM as ADMM,
        Refit as Refit,
        Solver as Solver,
        SparseGPT as SparseGPT,
        ZeroOut as ZeroOut,
    )
    from wanda_lightning.core.statistics import InputStatistics as InputStatistics
    from wanda_lightning.data.images import ImageDataModule as ImageDataModule
    from wanda_lightning.data.own_text import sample_windows as sample_windows
    from wanda_lightning.data.sentences import SentenceDataModule as SentenceDataModule
    from wanda_lightning.data.text import TextDataModule as TextDataModule
    from wanda_lightning.engine.prune import prune as prune
    from wanda_lightning.modules import (
        CausalLMModule as CausalLMModule,
        EmbeddingModule as EmbeddingModule,
        ImageClassifierModule as ImageClassifierModule,
    )
    from wanda_lightning.report import PruningReport as PruningReport
    from wanda_lightning.units.shrink import Shrunk as Shrunk, shrink as shrink
    from wanda_lightning.streaming import (
        perplexity_from_disk as perplexity_from_disk,
        prune_from_disk as prune_from_disk,
        shrink_from_disk as shrink_from_disk,
    )
    from wanda_lightning.training import (
        Distill as Distill,
        NoRecovery as NoRecovery,
        Reconstruct as Reconstruct,
    )
    from wanda_lightning.training.held_zeros import keep_zeros as keep_zeros

_HOMES = {
    "callbacks": (
        "BestAfterPruning CubicSchedule DistillFromDense KeepZeros LinearSchedule OneShot "
        "PruningCallback SavePretrained Schedule WandaPrune"
    ),
    "callbacks.prunable_module": "PrunableModule",
    "common.errors": "UserError",
    "config": "PruningConfig",
    "core.allocation": "Allocation DenseLayer Fisher OWL PerLayer Uniform match_target",
    "core.criteria": "Criterion Magnitude RIA Wanda",
    "core.patterns": "EqualShare Experts NM Pattern Structured Unstructured",
    "core.selection": "Selection",
    "core.solvers": "ADMM Refit Solver SparseGPT ZeroOut",
    "core.statistics": "InputStatistics",
    "data.images": "ImageDataModule",
    "data.own_text": "sample_windows",
    "data.sentences": "SentenceDataModule",
    "data.text": "TextDataModule",
    "modules": "CausalLMModule EmbeddingModule ImageClassifierModule",
    "engine.prune": "prune",
    "training": "Distill NoRecovery Reconstruct",
    "report": "PruningReport",
    "units.shrink": "Shrunk shrink",
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
