"""Keep the zeros of a pruned model while it trains."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from wanda_lightning.callbacks.calibration import pruning_target
from wanda_lightning.models import walk


class KeepZeros(Callback):
    """Keep every zero of a pruned model zero while it trains.

    For a model that was pruned before; `PruningCallback` does the same by itself. What counts is every layer that
    `prune` would prune and that holds zeros when training starts, unless it is zero altogether (freshly initialised).
    Gradients are masked as they accumulate, so that clipping and moments see them masked; weights are zeroed right
    after each optimizer step, so that weight decay and momentum cannot revive them.
    """

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._pruned: dict[nn.Parameter, Tensor] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the zeros and hold them."""
        target = pruning_target(pl_module)
        names = [layer.name for layer in walk(target).layers if _is_sparse(layer.parameter)]
        if not names:
            rank_zero_warn("KeepZeros found no zeros in any prunable layer: load pruned weights, or prune first")
        self.hold(target, names, trainer.optimizers)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let go of the zeros."""
        self.release()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave no hooks behind."""
        self.release()

    def hold(self, module: nn.Module, layers: Iterable[str], optimizers: Iterable[Optimizer]) -> None:
        """From now on, keep what is zero in these layers.

        Args:
            module: The model.
            layers: Names of layers in it.
            optimizers: Those that step its weights.
        """
        self.release()
        parameters = {layer.name: layer.parameter for layer in walk(module).layers}
        for name in layers:
            weight = parameters[name]
            assert isinstance(weight, nn.Parameter)
            self._pruned[weight] = weight.detach() == 0
            if weight.requires_grad:
                self._handles.append(weight.register_post_accumulate_grad_hook(self._mask_gradient))
        self._handles.extend(optimizer.register_step_post_hook(self._zero_weights) for optimizer in optimizers)

    def release(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._pruned.clear()

    def _mask_gradient(self, weight: Tensor) -> None:
        assert isinstance(weight, nn.Parameter)
        if weight.grad is not None:
            weight.grad.masked_fill_(self._pruned[weight], 0)

    @torch.no_grad()
    def _zero_weights(self, optimizer: Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for weight in group["params"]:
                if weight in self._pruned:
                    weight.masked_fill_(self._pruned[weight], 0)


def is_pruned(module: nn.Module, layers: Iterable[str]) -> bool:
    """Whether all these layers are there and hold zeros."""
    parameters = {layer.name: layer.parameter for layer in walk(module).layers}
    return all(name in parameters and _is_sparse(parameters[name]) for name in layers)


def _is_sparse(weight: Tensor) -> bool:
    return 0 < int(weight.count_nonzero()) < weight.numel()
