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
        ShrinkCallback as ShrinkCallback,
        WandaPrune as WandaPrune,
    )
    from wanda_lightning.common.errors import UserError as UserError
    from wanda_lightning.config import PruningConfig as PruningConfig
    from wanda_lightning.core import (
        ADMM as ADMM,
        NM as NM,
        OWL as OWL,
        Fisher as Fisher,
        PerLayer as PerLayer,
        SparseGPT as SparseGPT,
    )
    from wanda_lightning.data.images import ImageDataModule as ImageDataModule
    from wanda_lightning.data.own_text import sample_windows as sample_windows
    from wanda_lightning.data.sentences import SentenceDataModule as SentenceDataModule
    from wanda_lightning.data.text import TextDataModule as TextDataModule
    from wanda_lightning.methods import register as register
    from wanda_lightning.lightning_modules import (
        CausalLMModule as CausalLMModule,
        EmbeddingModule as EmbeddingModule,
        ImageClassifierModule as ImageClassifierModule,
    )
    from wanda_lightning.report import PruningReport as PruningReport
    from wanda_lightning.streaming import (
        prune_from_disk as prune_from_disk,
        shrink_from_disk as shrink_from_disk,
    )
    from wanda_lightning.training import (
        Distill as Distill,
        Reconstruct as Reconstruct,
    )
    from wanda_lightning.training.held_zeros import keep_zeros as keep_zeros
    from wanda_lightning.verbs.prune import prune as prune
    from wanda_lightning.verbs.shrink import shrink as shrink

_HOMES = {
    "callbacks": (
        "BestAfterPruning CubicSchedule DistillFromDense KeepZeros LinearSchedule OneShot "
        "PruningCallback SavePretrained ShrinkCallback WandaPrune"
    ),
    "common.errors": "UserError",
    "config": "PruningConfig",
    "core": "ADMM Fisher NM OWL PerLayer SparseGPT",
    "data.images": "ImageDataModule",
    "data.own_text": "sample_windows",
    "data.sentences": "SentenceDataModule",
    "data.text": "TextDataModule",
    "lightning_modules": "CausalLMModule EmbeddingModule ImageClassifierModule",
    "methods": "register",
    "training": "Distill Reconstruct",
    "report": "PruningReport",
    "streaming": "prune_from_disk shrink_from_disk",
    "training.held_zeros": "keep_zeros",
    "verbs.prune": "prune",
    "verbs.shrink": "shrink",
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
