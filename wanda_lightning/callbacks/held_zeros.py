"""Hold pruned weights at zero while a model trains."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.optim.swa_utils import AveragedModel
from torch.utils.hooks import RemovableHandle

from wanda_lightning.core.bits import pack, unpack
from wanda_lightning.core.masking import mask_
from wanda_lightning.models import Layer, find_layers
from wanda_lightning.parallel import SINGLE_PROCESS, Processes, local, reshard, zero_counts
from wanda_lightning.refusals import refuse_spread_experts


class HeldZeros:
    """Hold the zeros of some layers at zero while the model trains, until `release`.

    A hook masks each gradient as it accumulates, so that clipping and the optimizer's moments use the masked gradient.
    Another hook zeroes the weights after each step of any optimizer, since weight decay and momentum could change them.

    Attributes:
        layers: Names of the layers of the latest `hold`.
    """

    def __init__(self) -> None:
        self.layers: list[str] = []
        self._handles: list[RemovableHandle] = []
        self._held_layers: list[tuple[Layer, nn.Parameter]] = []
        self._keep: dict[nn.Parameter, Tensor] = {}
        self._loaded: dict[str, Tensor] = {}
        self._at_release: dict[str, Tensor] = {}

    def hold(self, model: nn.Module, layers: Iterable[str]) -> None:
        """Hold the weights of the named layers that are zero now; release all others."""
        self.release()
        reshard(model)  # FSDP2 leaves its outermost module gathered, but the optimizer trains the shards
        unheld, self._loaded, self._at_release, self.layers = self._loaded, {}, {}, list(layers)
        found = {layer.name: layer for layer in prunable_layers(model)}
        for layer in (found[name] for name in self.layers):
            refuse_spread_experts(layer)
            weight = layer.parameter
            assert isinstance(weight, nn.Parameter)
            if weight not in self._keep:  # one parameter may hold many layers, not all of which are held
                self._keep[weight] = torch.ones_like(local(weight.detach()), dtype=torch.bool)
            keep = layer.part(self._keep[weight])
            keep.copy_(layer.weight != 0)
            if layer.name in unheld:
                keep |= unpack(unheld[layer.name], keep.shape).to(keep.device)
            self._held_layers.append((layer, weight))
        for weight in self._keep:
            self._mask_gradient(weight)
            trains = weight.requires_grad
            weight.requires_grad_()  # torch refuses the hook on a frozen weight, which may be unfrozen later
            self._handles.append(weight.register_post_accumulate_grad_hook(self._mask_gradient))
            weight.requires_grad_(trains)
        # A global hook, which also covers optimizers that are created later.
        self._handles.append(register_optimizer_step_post_hook(self._after_step))

    @torch.no_grad()
    def clear(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Zero copies of pruned weights: the optimizers' moments, and the weights that averaging callbacks average."""
        for optimizer in trainer.optimizers:
            for weight in self._held(optimizer):
                for value in optimizer.state.get(weight, {}).values():
                    if isinstance(value, Tensor) and value.shape == weight.shape and value.is_floating_point():
                        _zero(value, self._keep[weight])
        names = {parameter: name for name, parameter in pl_module.named_parameters()}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            average = getattr(callback, "_average_model", None)  # WeightAveraging and StochasticWeightAveraging
            if isinstance(average, nn.Module):
                averaged = average.module if isinstance(average, AveragedModel) else average
                averages = dict(averaged.named_parameters())
                for weight, keep in self._keep.items():
                    if weight in names and names[weight] in averages:
                        _zero(averages[names[weight]], keep)

    def unheld_zeros(self) -> dict[str, Tensor]:
        """Return which weights are zero by chance and not held, so that a resumed run can `load` them.

        After `release`, these are the weights at the time of the release. Sharded layers are left out.

        Returns:
            For each layer with such weights, their flat indices (int64) or one bit for each weight of the layer
            (uint8), whichever is smaller.
        """
        if not self._handles:
            return self._loaded or self._at_release
        found = {}
        for layer, weight in self._held_layers:
            if not isinstance(weight, DTensor):
                zero = (layer.part(weight.detach()) == 0) & layer.part(self._keep[weight])
                if zero.any():
                    found[layer.name] = pack(zero)
        return found

    def load(self, unheld: dict[str, Tensor]) -> None:
        """Do not hold these zeros at the next `hold`: the `unheld_zeros` of the run that is resumed."""
        self._loaded = unheld

    def release(self) -> None:
        """Remove all hooks."""
        try:
            self._at_release = self.unheld_zeros()
        finally:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()
            self._held_layers.clear()
            self._keep.clear()

    def _held(self, optimizer: Optimizer) -> list[nn.Parameter]:
        return [weight for group in optimizer.param_groups for weight in group["params"] if weight in self._keep]

    def _mask_gradient(self, weight: Tensor) -> None:
        assert isinstance(weight, nn.Parameter)
        if weight.grad is not None:
            _zero(weight.grad, self._keep[weight])

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        for weight in self._held(optimizer):
            _zero(weight, self._keep[weight])


def zeros_of(model: nn.Module, processes: Processes = SINGLE_PROCESS) -> dict[str, int]:
    """Count the zeros of each prunable layer, over all processes."""
    reshard(model)
    # Sharded experts are never pruned, see `refuse_spread_experts`.
    layers = [x for x in prunable_layers(model) if x.expert is None or not isinstance(x.parameter, DTensor)]
    counts = zero_counts([layer.part(layer.parameter.detach()) for layer in layers], processes)
    return {layer.name: count for layer, count in zip(layers, counts, strict=True)}


def prunable_layers(model: nn.Module) -> tuple[Layer, ...]:
    """Return all layers that may have been pruned."""
    return find_layers(model, include_grouped=True).layers


def _zero(tensor: Tensor, keep: Tensor) -> None:
    mask_(local(tensor.detach()), keep)
