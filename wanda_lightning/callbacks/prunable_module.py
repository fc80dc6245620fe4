"""The model inside a module that callbacks prune. docs/lightning_module.md lists what else a module may define."""

from lightning.pytorch import LightningModule
from torch import nn


def pruning_target(pl_module: LightningModule) -> nn.Module:
    """Return the model to prune: the module's `pruning_target` if it has one, else the module itself."""
    return getattr(pl_module, "pruning_target", pl_module)
