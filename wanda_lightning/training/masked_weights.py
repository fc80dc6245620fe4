"""The kept weights of pruned layers: which they are, how large they are, and how they are trained in float32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from wanda_lightning.core.types import KeepMask
from wanda_lightning.models import Layer


def keep_mask(parameter: Tensor, layers: Sequence[Layer]) -> KeepMask:
    """Return which entries of a parameter are kept weights of these layers; it may also hold layers that stay dense."""
    keep = torch.zeros_like(parameter, dtype=torch.bool)
    for layer in layers:
        layer.part(keep).copy_(layer.weight != 0)
    return keep


def root_mean_square(weights: Tensor) -> float:
    """Return the root mean square of some weights; 0 if there are none."""
    return float(weights.square().mean().sqrt()) if len(weights) else 0.0


@dataclass
class TrainedWeight:
    """One trained parameter.

    Attributes:
        parameter: The model's parameter.
        master: What the optimizer updates: the parameter, or a contiguous copy in float32, since bfloat16 would lose
            small steps. Fused AdamW of PyTorch 2.13 ignores strides.
        keep: Which of its entries are trained.
    """

    parameter: nn.Parameter
    master: Tensor
    keep: KeepMask

    @classmethod
    def of(cls, parameter: nn.Parameter, layers: Sequence[Layer]) -> TrainedWeight:
        """Return a parameter with its kept entries; all entries of a parameter without pruned layers are trained."""
        keep = keep_mask(parameter, layers) if layers else torch.ones_like(parameter, dtype=torch.bool)
        wide = torch.promote_types(parameter.dtype, torch.float32)
        is_master = parameter.dtype == wide and parameter.is_contiguous()
        return cls(parameter, parameter if is_master else parameter.detach().to(wide).contiguous(), keep)

    def scale(self) -> float:
        """Return the root mean square of the kept entries."""
        return root_mean_square(self.master.detach()[self.keep])

    def values(self) -> Tensor:
        """Return a copy of the values in the model."""
        return self.parameter.detach().clone()

    def take_gradient(self, scale: float) -> Tensor:
        """Return the gradient of this process divided by a scale, in the dtype of the master, and free it."""
        gradient = self.parameter.grad
        self.parameter.grad = None
        if gradient is None:
            return torch.zeros_like(self.master)
        return gradient.to(self.master.dtype).contiguous().div_(scale)

    def write(self) -> None:
        """Copy the master into the model."""
        self.master.grad = None
        if self.master is not self.parameter:
            self.set(self.master)

    @torch.no_grad()
    def set(self, values: Tensor) -> None:
        """Write values into the model."""
        self.parameter.copy_(values)


@contextmanager
def training(model: nn.Module, layers: Sequence[Layer], head: nn.Module | None) -> Iterator[list[TrainedWeight]]:
    """Turn on gradients for the trained parameters only; restore all flags and gradients at the end."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    trained = trained_parameters(model, layers, head)
    pruned: dict[int, list[Layer]] = {}
    for layer in layers:
        pruned.setdefault(id(layer.parameter), []).append(layer)
    try:
        for parameter, _, _ in before:
            parameter.requires_grad_(False)
            parameter.grad = None
        weights = [TrainedWeight.of(parameter, pruned.get(id(parameter), [])) for parameter in trained]
        for parameter in trained:
            parameter.requires_grad_(True)
        yield weights
    finally:
        for parameter, requires_grad, gradient in before:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient


def trained_parameters(model: nn.Module, layers: Sequence[Layer], head: nn.Module | None) -> list[nn.Parameter]:
    """Return the pruned parameters and all vectors, except those that are frozen or belong to the dense head."""
    pruned = {id(layer.parameter) for layer in layers}
    fixed = {id(parameter) for parameter in head.parameters()} if head is not None else set()
    return [
        parameter
        for parameter in model.parameters()
        if parameter.requires_grad
        and id(parameter) not in fixed
        and not isinstance(parameter, UninitializedParameter)
        and (id(parameter) in pruned or parameter.ndim < 2)
    ]
