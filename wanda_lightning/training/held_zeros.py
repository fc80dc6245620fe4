"""Keep pruned weights at zero while a model trains, in any training loop."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from wanda_lightning.common.errors import UserError
from wanda_lightning.core.masking import mask_, pack, unpack
from wanda_lightning.core.types import KeepMask
from wanda_lightning.models import Layer, find_layers
from wanda_lightning.parallel import SINGLE_PROCESS, Processes, local, reshard

State = dict[str, Any]  # of `HeldZeros`
_Masks = dict[Tensor, KeepMask]  # by parameter


def keep_zeros(
    model: nn.Module,
    *optimizers: Optimizer,
    state: State | None = None,
    processes: Processes = SINGLE_PROCESS,
) -> HeldZeros:
    """Keep every zero of a pruned model at zero from now on, in any training loop.

    The zeros are those that each prunable layer has now, unless it is all zeros, as some layers are initialized. All
    optimizers are covered, including those that are created later.

    Args:
        model: The pruned model, which may be wrapped, for example by DistributedDataParallel or Fabric.
        *optimizers: Optimizers that have already taken steps; their moments of zero weights become zero, too.
        state: `state_dict()` of an interrupted run with the same model, wrapped in the same way, to go on like it.
        processes: All processes, if they share the rows of one model (FSDP2).

    Returns:
        A handle that keeps the zeros, and a reference to the model, until `release()` or the end of a `with` block.

    Example:
        >>> model = nn.Linear(2, 2, bias=False)
        >>> model.weight = nn.Parameter(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        >>> with keep_zeros(nn.Sequential(model), optimizer):
        ...     model(torch.ones(1, 2)).sum().backward()
        ...     optimizer.step()
        >>> model.weight.data
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]])
    """
    zeros = HeldZeros()
    if state is not None:
        zeros.load_state_dict(state)
    zeros.hold_all(model, processes)
    zeros.clear(optimizers)
    return zeros


class HeldZeros(AbstractContextManager["HeldZeros"]):
    """Hold the zeros of some layers at zero while the model trains, until `release` or the end of a `with` block.

    A hook masks each gradient as it accumulates, so that clipping and the optimizer's moments use the masked gradient.
    Another hook zeroes the weights after each step of any optimizer, since weight decay and momentum could change them.
    """

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._held_layers: list[tuple[Layer, Tensor]] = []
        self._keep: _Masks = {}
        self._loaded: State = {}  # the state for the next `hold`
        # The state at `release`.
        self._released: State = {"layers": [], "unheld_zeros": {}}

    @property
    def is_holding(self) -> bool:
        """Whether any weight is held now."""
        return bool(self._handles)

    def __exit__(self, *_: object) -> None:
        self.release()

    def hold_all(self, model: nn.Module, processes: Processes = SINGLE_PROCESS) -> None:
        """Hold the zeros that each prunable layer has now, or only those of the layers in a loaded state."""
        layers = sharded_layers(model)
        names = self._loaded.get("layers")
        if not names:
            counts = _count_zeros(layers, processes)
            names = [name for name, count in counts.items() if 0 < count < layers[name].size]
        if not names and processes.rank == 0:
            warnings.warn(
                "No zeros were found in any prunable layer, so none are kept. Load pruned weights, or prune first.",
                stacklevel=3,
            )
        for name in names:
            if name not in layers:
                raise UserError(
                    f"state must be of the same model, wrapped in the same way, but this model has no {name}. Pass the "
                    "model as it was when the state was saved."
                )
        self.hold([layers[name] for name in names])

    def hold(self, layers: Sequence[Layer]) -> None:
        """Hold the weights of these layers that are zero now; release all others."""
        self.release()
        unheld = self._loaded.get("unheld_zeros", {})
        self._loaded = {}
        self._keep = keep_masks(layers, other_entries=True)
        self._held_layers = [(layer, layer.parameter) for layer in layers]
        for layer in layers:
            if layer.name in unheld:
                keep = layer.own(self._keep[layer.parameter])
                keep |= unpack(unheld[layer.name], keep.shape).to(keep.device)

        for weight in self._keep:
            self._mask_gradient(weight)  # it may have a gradient from before
            trains = weight.requires_grad
            weight.requires_grad_()  # torch refuses the hook on a frozen weight, which may be unfrozen later
            self._handles.append(weight.register_post_accumulate_grad_hook(self._mask_gradient))
            weight.requires_grad_(trains)
        # A global hook, which also covers optimizers that are created later.
        self._handles.append(register_optimizer_step_post_hook(self._after_step))

    @torch.no_grad()
    def clear(self, optimizers: Iterable[Optimizer]) -> None:
        """Zero the moments of held zeros in the state of optimizers."""
        for optimizer in optimizers:
            for weight in self._held(optimizer):
                for moment in optimizer.state.get(weight, {}).values():
                    # Besides the moments there may be a number of steps, or an 8-bit state of another shape.
                    is_like_weight = isinstance(moment, Tensor) and moment.shape == weight.shape
                    if is_like_weight and moment.is_floating_point():
                        _zero(moment, self._keep_of(weight))

    @torch.no_grad()
    def clear_copies(self, model: nn.Module, copies: Iterable[nn.Module]) -> None:
        """Zero the held zeros of a model in copies of it, such as averages of its weights.

        A copy may be the attribute `module` of another one, such as an `AveragedModel`.

        Raises:
            ValueError: The model or a copy has none of the held weights.
        """
        held = {
            name: self._keep[parameter]
            for name, parameter in model.named_parameters()
            if parameter in self._keep
        }
        for copy in copies:
            weights = {
                name.removeprefix("module."): weight for name, weight in copy.named_parameters()
            }
            weights |= dict(copy.named_parameters())
            common = held.keys() & weights.keys()
            if self._keep and not common:
                raise UserError(
                    "model must be the one whose zeros are kept, and copies must be copies or averages of it, but a "
                    f"{type(copy).__name__} has none of the {len(self._keep)} weights. Copy or average the whole model."
                )
            for name in common:
                _zero(weights[name], held[name])

    def state_dict(self) -> State:
        """Return what a resumed run must load, also after `release`: the layers, and zeros that train on.

        These are weights that are zero by chance, as a packed mask (`core.masking.pack`) for each layer; sharded layers
        are left out. The held zeros are in the weights.
        """
        if not self.is_holding:
            return self._loaded or self._released
        unheld = {}
        for layer, weight in self._held_layers:
            if isinstance(weight, DTensor):
                continue
            zero = (layer.own(weight.detach()) == 0) & layer.own(self._keep_of(weight))
            if zero.any():
                unheld[layer.name] = pack(zero)
        layers = [layer.name for layer, _ in self._held_layers]
        return {"layers": layers, "unheld_zeros": unheld}

    def load_state_dict(self, state: State) -> None:
        """Hold the same zeros as an interrupted run at the next `hold_all`; only `unheld_zeros` matter to `hold`."""
        # A KeyError if it is another dictionary.
        self._loaded = {"layers": state["layers"], "unheld_zeros": state["unheld_zeros"]}

    def release(self) -> None:
        """Remove all hooks."""
        try:
            self._released = self.state_dict()
        finally:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()
            self._held_layers.clear()
            self._keep.clear()

    def _held(self, optimizer: Optimizer) -> list[Tensor]:
        return [
            weight
            for group in optimizer.param_groups
            for weight in group["params"]
            if weight in self._keep
        ]

    def _keep_of(self, weight: Tensor) -> Tensor:
        """Return the mask of a weight, on its device: the model may have moved since `hold`."""
        keep = self._keep[weight].to(weight.device)
        self._keep[weight] = keep
        return keep

    def _mask_gradient(self, weight: Tensor) -> None:
        if weight.grad is not None:
            _zero(weight.grad, self._keep_of(weight))

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        for weight in self._held(optimizer):
            _zero(weight, self._keep_of(weight))


def keep_masks(layers: Iterable[Layer], other_entries: bool) -> _Masks:
    """Return the nonzero weights of some layers as a mask of each parameter, or of its shard in this process.

    A parameter may have entries that belong to none of the layers, such as those of other experts. The mask is
    `other_entries` there.
    """
    keep = {}
    for layer in layers:
        parameter = layer.parameter
        if parameter not in keep:
            shard = local(parameter.detach())
            keep[parameter] = torch.full_like(shard, other_entries, dtype=torch.bool)
        layer.own(keep[parameter]).copy_(layer.weight != 0)
    return keep


def zeros_of(model: nn.Module, processes: Processes = SINGLE_PROCESS) -> dict[str, int]:
    """Count the zeros of each prunable layer, over all processes."""
    return _count_zeros(sharded_layers(model), processes)


def sharded_layers(model: nn.Module) -> dict[str, Layer]:
    """Return all layers that may have been pruned by name, with their shards if the model is sharded."""
    # FSDP2 leaves its outermost module gathered, but the optimizer trains the shards.
    reshard(model)
    return {layer.name: layer for layer in find_layers(model).layers}


def _count_zeros(layers: Mapping[str, Layer], processes: Processes) -> dict[str, int]:
    counts = torch.zeros(len(layers), dtype=torch.int64)
    for index, layer in enumerate(layers.values()):
        if processes.rank == 0 or isinstance(layer.parameter, DTensor):
            counts[index] = (layer.weight == 0).count_nonzero()
    processes.all_reduce_sum([counts])
    return dict(zip(layers, counts.tolist(), strict=True))


def _zero(tensor: Tensor, keep: Tensor) -> None:
    # An average of weights may be on another device.
    mask_(local(tensor.detach()), keep.to(tensor.device))
