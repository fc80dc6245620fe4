"""Train the kept weights of pruned layers: masks, float32 masters, loss scale, the loop, best values, processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from wanda_lightning.core.masking import mask_
from wanda_lightning.core.types import KeepMask
from wanda_lightning.models import Layer
from wanda_lightning.parallel import Processes, local
from wanda_lightning.report import TrainingPass

_Item = TypeVar("_Item")
Losses = Callable[[float], Iterable[float]]  # see `MaskedWeights.step`
# Small gradients are zero in float16, and large ones infinite. Powers of two leave other dtypes unchanged.
LARGEST_SCALE, SMALLEST_SCALE = 2.0**16, 2.0**-16


def keep_masks(layers: Iterable[Layer], elsewhere: bool) -> dict[Tensor, KeepMask]:
    """Return the nonzero weights of some layers as a mask of each parameter (or of its shard in this process).

    A parameter may hold further layers, such as other experts; their entries are `elsewhere`.
    """
    keep: dict[Tensor, KeepMask] = {}
    for layer in layers:
        parameter = layer.parameter
        if parameter not in keep:
            keep[parameter] = torch.full_like(local(parameter.detach()), elsewhere, dtype=torch.bool)
        layer.part(keep[parameter]).copy_(layer.weight != 0)
    return keep


def in_one_order(batches: Sequence[Sequence[_Item]], processes: Processes) -> list[_Item | None]:
    """Return the samples of all processes in one order; None stands for a sample of another process.

    Batch i of all processes precedes batch i + 1 of any, so that the order depends on the batches alone.
    """
    order: list[_Item | None] = []
    longest = max(number for (number,) in processes.all_gather([len(batches)]))
    sizes = processes.all_gather([len(batch) for batch in batches] + [0] * (longest - len(batches)))
    for index in range(longest):
        for rank in range(processes.world_size):
            order += batches[index] if rank == processes.rank and index < len(batches) else [None] * sizes[rank][index]
    return order


def sum_over_processes(losses: Callable[[], Iterable[float]], processes: Processes) -> float:
    """Return the sum of the losses of all processes; an error in one of them ends all."""
    total = torch.zeros(1, dtype=torch.float64)  # a Trainer may set the default to 16 bits
    with processes.fail_together():
        for loss in losses():
            total += loss
    processes.all_reduce_sum([total])
    return float(total)


class _NotFiniteError(Exception):
    """A loss or a gradient is NaN or infinite."""


class MaskedWeights(AbstractContextManager["MaskedWeights"]):
    """The trained parameters of a pruned model, or of a part of it; zeros stay zero.

    Inside a `with` block, only these parameters have gradients. At its end, also after an error, they get their best
    values (see `keep_best`), and all flags and gradients of the module are restored.

    A parameter that holds some of the pruned layers is trained where these are not zero; any other one as a whole. An
    optimizer updates the masters: the parameters themselves, or copies in float32, since bfloat16 would lose small
    steps. Masters are contiguous, because fused AdamW of PyTorch 2.13 ignores strides.

    All processes train copies of the module together, each on its own samples. With `skip_unreached`, the optimizer
    skips a parameter that no sample of a step reaches; otherwise its gradient is 0.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Sequence[Tensor],
        layers: Sequence[Layer],
        processes: Processes,
        skip_unreached: bool = False,
    ) -> None:
        self._parameters, self._processes, self._skip_unreached = parameters, processes, skip_unreached
        self._before = [
            (parameter, parameter.requires_grad, parameter.grad)
            for parameter in dict.fromkeys((*module.parameters(), *parameters))
        ]
        kept = keep_masks(layers, elsewhere=False)
        self._keep = [kept[p] if p in kept else torch.ones_like(p, dtype=torch.bool) for p in parameters]
        self.masters = [_master(parameter) for parameter in parameters]
        self.keep_best()
        self._scale = LARGEST_SCALE

    def __enter__(self) -> MaskedWeights:
        """Turn on gradients for the trained parameters only."""
        for parameter, _, _ in self._before:
            parameter.requires_grad_(False)
            parameter.grad = None
        for parameter in self._parameters:
            parameter.requires_grad_(True)
        return self

    @torch.no_grad()
    def __exit__(self, *_: object) -> None:
        """Write the best values, and restore all flags and gradients."""
        for parameter, best in zip(self._parameters, self._best, strict=True):
            parameter.copy_(best)
        for parameter, requires_grad, gradient in self._before:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient

    def groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """Return the optimizer's groups; learning rates are relative to the root mean square of the kept weights."""
        return [
            {"params": [master], "lr": learning_rate * _root_mean_square(master.detach()[keep])}
            for master, keep in zip(self.masters, self._keep, strict=True)
        ]

    def fit(
        self,
        optimizer: torch.optim.Optimizer,
        passes: Iterable[Iterable[Losses]],
        held_out: Callable[[], float | None],
        stops_early: bool = False,
    ) -> tuple[list[TrainingPass], str]:
        """Take the steps of each pass, and keep the weights with the lowest held-out loss.

        `held_out()` returns the loss of the samples that are not trained on, or None if there are none; then the latest
        weights are kept. Training ends if a loss or gradient is NaN or infinite and, with `stops_early`, after the
        first pass that does not lower the held-out loss.

        Returns:
            The losses before training and of each pass, and why training stopped; empty if all is finite.
        """
        lowest, count = held_out(), 0
        found = [TrainingPass(None, lowest)]
        try:
            _require_finite("held-out loss", lowest if stops_early else None)
            for steps in passes:
                losses = []
                for step in steps:
                    losses.append(self.step(optimizer, step))
                    count += 1
                after = held_out()
                falls = after is None or lowest is None or after < lowest
                if stops_early and not falls:
                    break
                _require_finite("held-out loss", after)
                found.append(TrainingPass(sum(losses) / len(losses), after))
                if falls:
                    lowest = after
                    self.keep_best()
        except _NotFiniteError as error:
            return found, f"the {error} of step {count + 1} was not finite"
        return found, ""

    def step(self, optimizer: torch.optim.Optimizer, losses: Losses) -> float:
        """Take one optimizer step, and return the loss before it, summed over the samples of all processes.

        `losses(scale)` yields the losses of this process's samples, and passes their gradients, times the scale,
        backward. If the gradients overflow, they are computed again with a smaller scale, as no sample should be left
        out.
        """
        loss, is_finite = self._set_gradients(losses)
        while not is_finite and self._scale > SMALLEST_SCALE:
            self._scale /= 16
            loss, is_finite = self._set_gradients(losses)
        if not is_finite:
            raise _NotFiniteError("gradient")
        optimizer.step()
        with torch.no_grad():
            for parameter, master in zip(self._parameters, self.masters, strict=True):
                master.grad = None
                if master is not parameter:
                    parameter.copy_(master)
        return loss

    def keep_best(self) -> None:
        """Take the present values as the best ones."""
        self._best = [parameter.detach().clone() for parameter in self._parameters]

    def _set_gradients(self, losses: Losses) -> tuple[float, bool]:
        """Give the masters the masked gradients of all processes if they are finite; return the loss, and whether."""
        loss = sum_over_processes(lambda: losses(self._scale), self._processes)
        _require_finite("loss", loss)
        reached = torch.tensor([parameter.grad is not None for parameter in self._parameters], dtype=torch.int64)
        gradients = [self._take_gradient(*pair) for pair in zip(self._parameters, self.masters, strict=True)]
        self._processes.all_reduce_sum([reached, *gradients])
        for gradient, keep in zip(gradients, self._keep, strict=True):
            mask_(gradient, keep)
        is_finite = bool(torch.stack([gradient.sum().isfinite().cpu() for gradient in gradients]).all())
        if is_finite:  # otherwise the next backward pass would add to those of a master that is the parameter itself
            for master, gradient, is_reached in zip(self.masters, gradients, reached.tolist(), strict=True):
                master.grad = gradient if is_reached or not self._skip_unreached else None
        return loss, is_finite

    def _take_gradient(self, parameter: Tensor, master: Tensor) -> Tensor:
        """Return the unscaled gradient of this process in the dtype of the master, and free the parameter's."""
        gradient, parameter.grad = parameter.grad, None
        if gradient is None:
            return torch.zeros_like(master)
        return gradient.to(master.dtype).contiguous().div_(self._scale)


def _require_finite(name: str, loss: float | None) -> None:
    if loss is not None and not math.isfinite(loss):
        raise _NotFiniteError(name)


def _master(parameter: Tensor) -> Tensor:
    wide = torch.promote_types(parameter.dtype, torch.float32)
    is_master = parameter.dtype == wide and parameter.is_contiguous()
    return parameter if is_master else parameter.detach().to(wide).contiguous()


def _root_mean_square(weights: Tensor) -> float:
    return float(weights.square().mean().sqrt()) if len(weights) else 0.0
