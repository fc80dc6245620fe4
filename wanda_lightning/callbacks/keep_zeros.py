"""Hold pruned weights at zero while a model trains."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from wanda_lightning.callbacks.trainer import averaged_models, processes_of, pruning_target
from wanda_lightning.checks import refuse_pytorch_lightning
from wanda_lightning.core.bits import pack, unpack
from wanda_lightning.core.masking import mask_
from wanda_lightning.models import Layer, find_layers
from wanda_lightning.parallel import SINGLE_PROCESS, Processes, local, reshard, zero_counts
from wanda_lightning.refusals import refuse_sharded_experts


class KeepZeros(Callback):
    """Keep every zero of a model that was pruned earlier at zero while the model trains.

    `PruningCallback` does this for the layers that it prunes. `KeepZeros` keeps the zeros that each prunable layer has
    when training starts. A layer that is all zeros is skipped, since some layers are initialized to zero.
    """

    def __init__(self) -> None:
        self._zeros = HeldZeros()
        self._resumed: list[str] = []  # layers of a loaded checkpoint

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a Trainer of `pytorch_lightning`, or a strategy that distributes the model in an unsupported way."""
        refuse_pytorch_lightning(trainer)
        processes_of(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the zeros and hold them."""
        target = pruning_target(pl_module)
        layers, self._resumed = self._resumed, []
        if not layers:
            found = prunable_layers(target)
            for layer in found:
                refuse_sharded_experts(layer)
            sizes = {layer.name: layer.size for layer in found}
            zeros = zeros_of(target, processes_of(trainer))
            layers = [name for name, count in zeros.items() if 0 < count < sizes[name]]
        if not layers:
            rank_zero_warn("KeepZeros found no zeros in any prunable layer. Load pruned weights, or prune first.")
        self._zeros.hold(target, layers)
        self._zeros.clear(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove the hooks."""
        self._zeros.release()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Remove the hooks."""
        self._zeros.release()

    def state_dict(self) -> dict[str, Any]:
        """Return the names of the layers and which of their zeros are not kept; the kept zeros are in the weights."""
        return {"layers": self._resumed or self._zeros.layers, "unheld_zeros": self._zeros.unheld_zeros()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state."""
        self._resumed = state_dict["layers"]
        self._zeros.load(state_dict["unheld_zeros"])


def holds_zeros(trainer: L.Trainer) -> bool:
    """Whether a callback holds zeros now."""
    held = (getattr(callback, "_zeros", None) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    return any(isinstance(zeros, HeldZeros) and zeros.is_holding for zeros in held)


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

    @property
    def is_holding(self) -> bool:
        """Whether it holds any weight now."""
        return bool(self._handles)

    def hold(self, model: nn.Module, layers: Iterable[str]) -> None:
        """Hold the weights of the named layers that are zero now; release all others."""
        self.release()
        reshard(model)  # FSDP2 leaves its outermost module gathered, but the optimizer trains the shards
        unheld, self._loaded, self._at_release, self.layers = self._loaded, {}, {}, list(layers)
        found = {layer.name: layer for layer in prunable_layers(model)}
        for layer in (found[name] for name in self.layers):
            refuse_sharded_experts(layer)
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
        for average in averaged_models(trainer):
            averages = dict(average.named_parameters())
            for weight, keep in self._keep.items():
                if weight in names and names[weight] in averages:
                    _zero(averages[names[weight]], keep)

    def unheld_zeros(self) -> dict[str, Tensor]:
        """Return which weights are zero by chance and not held, by layer, as `core.bits.pack` stores them.

        A resumed run must `load` them. After `release`, these are the weights at the time of the release. Sharded
        layers are left out.
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
        """Do not hold the `unheld_zeros` of a resumed run at the next `hold`."""
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
    # Sharded experts are never pruned, see `refuse_sharded_experts`.
    layers = [x for x in prunable_layers(model) if x.expert is None or not isinstance(x.parameter, DTensor)]
    counts = zero_counts([layer.part(layer.parameter.detach()) for layer in layers], processes)
    return {layer.name: count for layer, count in zip(layers, counts, strict=True)}


def prunable_layers(model: nn.Module) -> tuple[Layer, ...]:
    """Return all layers that may have been pruned."""
    return find_layers(model, include_grouped=True).layers


def _zero(tensor: Tensor, keep: Tensor) -> None:
    mask_(local(tensor.detach()), keep)
