"""Keep the zeros of a pruned model while it trains."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.optim.swa_utils import AveragedModel
from torch.utils.hooks import RemovableHandle

from wanda_lightning.callbacks.calibration import processes_of, pruning_target
from wanda_lightning.core.solvers import zero_others_
from wanda_lightning.distributed import ALONE, Processes, local, reshard, zero_counts
from wanda_lightning.models import Layer, walk
from wanda_lightning.refusals import refuse_spread_experts


class HeldZeros:
    """The zeros of some layers, which stay zero through training until they are released.

    Gradients are masked as they accumulate, so that clipping and moments see them masked; weights are zeroed right
    after each step of any optimizer, so that weight decay and momentum cannot revive them.
    """

    def __init__(self) -> None:
        self.layers: list[str] = []
        self._handles: list[RemovableHandle] = []
        self._held_layers: list[tuple[Layer, nn.Parameter]] = []
        self._keep: dict[nn.Parameter, Tensor] = {}
        self._loaded: dict[str, Tensor] = {}
        self._at_release: dict[str, Tensor] = {}

    def hold(self, model: nn.Module, layers: Iterable[str]) -> None:
        """From now on, keep what is zero in these layers, and only that.

        Args:
            model: Where the layers are.
            layers: Their names.
        """
        self.release()
        reshard(model)  # FSDP2 leaves its outermost module gathered, and what is held are the shards
        alive, self._loaded, self._at_release, self.layers = self._loaded, {}, {}, list(layers)
        found = {layer.name: layer for layer in _layers(model)}
        for layer in (found[name] for name in self.layers):
            refuse_spread_experts(layer)
            weight = layer.parameter
            assert isinstance(weight, nn.Parameter)
            if weight not in self._keep:  # a parameter may hold many layers, of which some may not be held
                self._keep[weight] = torch.ones_like(local(weight.detach()), dtype=torch.bool)
            keep = layer.part(self._keep[weight])
            keep.copy_(layer.weight != 0)
            if layer.name in alive:
                keep |= _unpacked(alive[layer.name], keep)
            self._held_layers.append((layer, weight))
        for weight in self._keep:
            self._mask_gradient(weight)
            trains = weight.requires_grad
            weight.requires_grad_()  # torch hangs no hook on a frozen weight, but it may be unfrozen later
            self._handles.append(weight.register_post_accumulate_grad_hook(self._mask_gradient))
            weight.requires_grad_(trains)
        # Of every optimizer, also one that is made later.
        self._handles.append(register_optimizer_step_post_hook(self._after_step))

    @torch.no_grad()
    def clear(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Zero what else remembers the weights: the optimizers' moments and the averages of averaging callbacks."""
        for optimizer in trainer.optimizers:
            for weight in self._held(optimizer):
                for value in optimizer.state.get(weight, {}).values():
                    if isinstance(value, Tensor) and value.shape == weight.shape and value.is_floating_point():
                        _zero(value, self._keep[weight])
        names = {parameter: name for name, parameter in pl_module.named_parameters()}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            average = getattr(callback, "_average_model", None)  # of Lightning's WeightAveraging and SWA
            if isinstance(average, nn.Module):
                averaged = average.module if isinstance(average, AveragedModel) else average
                averages = dict(averaged.named_parameters())
                for weight, keep in self._keep.items():
                    if weight in names and names[weight] in averages:
                        _zero(averages[names[weight]], keep)

    def alive(self) -> dict[str, Tensor]:
        """By layer, weights that are zero by chance and not held: what a resumed run has to `load`.

        After a release, those of then; layers without any are left out, and so are sharded ones. Flat indices, or, of
        many, one bit for each weight.
        """
        if not self._handles:
            return self._loaded or self._at_release
        found = {}
        for layer, weight in self._held_layers:
            if not isinstance(weight, DTensor):
                zero = (layer.part(weight.detach()) == 0) & layer.part(self._keep[weight])
                if zero.any():
                    found[layer.name] = _packed(zero)
        return found

    def load(self, alive: dict[str, Tensor]) -> None:
        """The next `hold` takes up a run that had these."""
        self._loaded = alive

    def release(self) -> None:
        """Remove all hooks."""
        try:
            self._at_release = self.alive()
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


class KeepZeros(Callback):
    """Keep every zero of a pruned model zero while it trains.

    For a model that was pruned before; `PruningCallback` does the same by itself. What counts is every layer that
    `prune` would prune and that holds zeros when training starts, unless it is zero altogether (freshly initialised).
    """

    def __init__(self) -> None:
        self._zeros = HeldZeros()
        self._resumed: list[str] = []  # layers that the run before held

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what would lose zeros.

        Raises:
            MisconfigurationException: If the strategy spreads the model in a way in which they cannot be held.
        """
        processes_of(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the zeros and hold them."""
        target = pruning_target(pl_module)
        layers, self._resumed = self._resumed, []
        if not layers:
            found = _layers(target)
            for layer in found:
                refuse_spread_experts(layer)
            sizes = {layer.name: layer.size for layer in found}
            zeros = zeros_of(target, processes_of(trainer))
            layers = [name for name, count in zeros.items() if 0 < count < sizes[name]]
        if not layers:
            rank_zero_warn("KeepZeros found no zeros in any prunable layer: load pruned weights, or prune first")
        self._zeros.hold(target, layers)
        self._zeros.clear(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let go of the zeros."""
        self._zeros.release()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave no hooks behind."""
        self._zeros.release()

    def state_dict(self) -> dict[str, Any]:
        """Which layers are held, and which of their zeros are not; the others are in the weights."""
        return {"layers": self._resumed or self._zeros.layers, "alive": self._zeros.alive()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a run where it was."""
        self._resumed = state_dict["layers"]
        self._zeros.load(state_dict["alive"])


def zeros_of(model: nn.Module, processes: Processes = ALONE) -> dict[str, int]:
    """How many weights of each prunable layer are zero."""
    reshard(model)
    # Experts that are spread over processes are not pruned, see `refuse_spread_experts`.
    layers = [e for e in _layers(model) if e.expert is None or not isinstance(e.parameter, DTensor)]
    counts = zero_counts([layer.part(layer.parameter.detach()) for layer in layers], processes)
    return {layer.name: count for layer, count in zip(layers, counts, strict=True)}


def _layers(model: nn.Module) -> tuple[Layer, ...]:
    """All that may have been pruned."""
    return walk(model, include_grouped=True).layers


def _packed(flags: Tensor) -> Tensor:
    indices = flags.flatten().nonzero().squeeze(1).cpu()
    if indices.nbytes * 8 < flags.numel():
        return indices
    return torch.from_numpy(np.packbits(flags.cpu().numpy()))


def _unpacked(packed: Tensor, like: Tensor) -> Tensor:
    if packed.dtype == torch.uint8:
        flags = torch.from_numpy(np.unpackbits(packed.cpu().numpy(), count=like.numel())).bool()
    else:
        flags = torch.zeros(like.numel(), dtype=torch.bool).index_fill_(0, packed.cpu(), True)
    return flags.view(like.shape).to(like.device)


def _zero(tensor: Tensor, keep: Tensor) -> None:
    zero_others_(local(tensor.detach()), keep)
