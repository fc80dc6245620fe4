"""One-shot pruning for PyTorch Lightning, Hugging Face and timm models."""

from wanda_lightning.callbacks import (
    CubicSchedule,
    KeepZeros,
    LinearSchedule,
    MagnitudePrune,
    OneShot,
    PruningCallback,
    SavePretrained,
    Schedule,
    SparseGPTPrune,
    WandaPrune,
)
from wanda_lightning.config import PruningConfig
from wanda_lightning.core.allocation import OWL, AlphaPruning, Fisher, PerLayer, Uniform
from wanda_lightning.core.criteria import RIA, Magnitude, Wanda
from wanda_lightning.core.patterns import NM, EqualShare, Unstructured
from wanda_lightning.core.solvers import ADMM, Refit, SparseGPT, ZeroOut
from wanda_lightning.data import ImageDataModule, TextDataModule
from wanda_lightning.modules import CausalLMModule, ImageClassifierModule
from wanda_lightning.pruning import prune
from wanda_lightning.recovery import NoRecovery, Reconstruct
from wanda_lightning.report import PruningReport

__all__ = [
    "ADMM",
    "NM",
    "OWL",
    "RIA",
    "AlphaPruning",
    "CausalLMModule",
    "CubicSchedule",
    "EqualShare",
    "Fisher",
    "ImageClassifierModule",
    "ImageDataModule",
    "KeepZeros",
    "LinearSchedule",
    "Magnitude",
    "MagnitudePrune",
    "NoRecovery",
    "OneShot",
    "PerLayer",
    "PruningCallback",
    "PruningConfig",
    "PruningReport",
    "Reconstruct",
    "Refit",
    "SavePretrained",
    "Schedule",
    "SparseGPT",
    "SparseGPTPrune",
    "TextDataModule",
    "Uniform",
    "Unstructured",
    "Wanda",
    "WandaPrune",
    "ZeroOut",
    "prune",
]
