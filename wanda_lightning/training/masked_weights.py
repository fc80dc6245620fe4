"""The loop that all recoveries train kept weights with, in one process or several."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from itertools import zip_longest
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from wanda_lightning.common.aliases import Kwargs
from wanda_lightning.common.float64 import wide_dtype, widened
from wanda_lightning.core.masking import mask_
from wanda_lightning.models import Layer
from wanda_lightning.parallel import Processes
from wanda_lightning.report import TrainingPass
from wanda_lightning.training.held_zeros import keep_masks

_Sample = TypeVar("_Sample")
Loss = Callable[[Sequence[Any], float | None], Iterable[float]]  # see `MaskedWeights.fit`
# Small gradients are zero in float16, and large ones infinite. Powers of two leave other dtypes unchanged.
LARGEST_SCALE = 2.0**16
SMALLEST_SCALE = 2.0**-16


def hold_out(
    batches: Sequence[Sequence[_Sample]], every: int, processes: Processes
) -> Sequence[list[_Sample | None]]:
    """Divide the samples of all processes into those to train on, and every n-th one, which is held out.

    A sample of another process is None. The order depends on the batches alone: batch i of all processes precedes batch
    i + 1 of any.
    """
    # Processes may have different numbers of batches, and a batch any number of samples.
    sizes = [len(batch) for batch in batches]
    sizes_by_rank = [processes.broadcast(sizes, rank) for rank in range(processes.world_size)]
    samples: list[_Sample | None] = []
    for index, counts in enumerate(zip_longest(*sizes_by_rank, fillvalue=0)):
        for rank, count in enumerate(counts):
            if count and rank == processes.rank:
                samples += batches[index]
            else:
                samples += [None] * count

    held_out = samples[every - 1 :: every]
    del samples[every - 1 :: every]
    return samples, held_out


class _TrainedParameter:
    """A parameter, which of its entries train, its master, and its best values so far.

    The optimizer updates the master: the parameter itself, or a copy in float32, since bfloat16 would lose small steps.
    """

    def __init__(self, parameter: Tensor, keep: Tensor | None) -> None:
        self.parameter = parameter
        self.keep = torch.ones_like(parameter, dtype=torch.bool) if keep is None else keep
        self.master = parameter
        # Fused AdamW of PyTorch 2.13 ignores strides.
        if parameter.dtype != wide_dtype(parameter) or not parameter.is_contiguous():
            self.master = widened(parameter.detach()).contiguous()
        self.keep_best()

    def keep_best(self) -> None:
        """Take the present values for the best."""
        self.best = self.parameter.detach().clone()

    def take_gradient(self, scale: float) -> Tensor:
        """Remove the gradient of the parameter; return it without its scale, in the dtype of the master."""
        gradient = self.parameter.grad
        self.parameter.grad = None
        if gradient is None:
            return torch.zeros_like(self.master)
        return gradient.to(self.master.dtype).contiguous().div_(scale)


class MaskedWeights(AbstractContextManager["MaskedWeights"]):
    """The trained parameters of a pruned module: where a pruned layer is not zero, and all others as a whole.

    Inside a `with` block, only these parameters have gradients. At its end, also after an error, they get their best
    values (see `fit`), and all flags and gradients of the module are restored.

    All processes train copies of the module together, each on its own samples. With `skip_unreached`, the optimizer
    skips a parameter that no sample of a step reaches; otherwise its gradient is 0.
    """

    def __init__(
        self,
        module: Module,
        parameters: Sequence[Tensor],
        layers: Sequence[Layer],
        processes: Processes,
        skip_unreached: bool = False,
    ) -> None:
        self._processes = processes
        self._skip_unreached = skip_unreached
        everything = (*module.parameters(), *parameters)
        self._before = {tensor: (tensor.requires_grad, tensor.grad) for tensor in everything}
        kept = keep_masks(layers, other_entries=False)
        self._trained = [_TrainedParameter(tensor, kept.get(tensor)) for tensor in parameters]
        self._scale = LARGEST_SCALE

    def __enter__(self) -> MaskedWeights:
        """Turn on gradients for the trained parameters only."""
        for tensor in self._before:
            tensor.requires_grad_(False)
            tensor.grad = None
        for trained in self._trained:
            trained.parameter.requires_grad_(True)
        return self

    @torch.no_grad()
    def __exit__(self, *_: object) -> None:
        """Write the best values, and restore all flags and gradients."""
        for trained in self._trained:
            trained.parameter.copy_(trained.best)
        for tensor, (requires_grad, gradient) in self._before.items():
            tensor.requires_grad_(requires_grad)
            tensor.grad = gradient

    def groups(self, learning_rate: float) -> list[Kwargs]:
        """Return the optimizer's groups; learning rates are relative to the root mean square of the kept weights."""
        groups = []
        for trained in self._trained:
            kept = trained.master.detach()[trained.keep]
            size = float(kept.square().mean().sqrt().nan_to_num())  # the mean of no weights is NaN
            groups.append({"params": [trained.master], "lr": learning_rate * size})
        return groups

    def fit(
        self,
        optimizer: Optimizer,
        passes: Iterable[Iterable[Sequence[Any]]],
        held_out: Sequence[Any],
        loss: Loss,
        stops_early: bool = False,
    ) -> tuple[list[TrainingPass], str]:
        """Take the steps of each pass, and keep the weights with the lowest held-out loss, or else the latest.

        A step is a list of samples. `loss(samples, scale)` yields the parts of their loss that this process computes,
        and passes their gradients, times the scale, backward; with None for a scale, it only computes the loss. If a
        loss or gradient is NaN or infinite, training stops; with `stops_early` also after the first pass that does not
        lower the held-out loss. Return the losses before training and of each pass, and what was not finite.
        """
        lowest = self.evaluate(held_out, loss)
        results = [TrainingPass(None, lowest)]
        count = 0  # of steps
        try:
            if stops_early:
                _require_finite("held-out loss", lowest)
            for steps in passes:
                losses = []
                for samples in steps:
                    losses.append(self.step(optimizer, samples, loss))
                    count += 1

                after = self.evaluate(held_out, loss)
                falls = after is None or lowest is None or after < lowest
                if stops_early and not falls:
                    break
                _require_finite("held-out loss", after)
                results.append(TrainingPass(sum(losses) / len(losses), after))
                if falls:
                    lowest = after
                    for trained in self._trained:
                        trained.keep_best()
        except _NotFiniteError as error:
            return results, f"the {error} of step {count + 1} was not finite"
        return results, ""

    def evaluate(self, samples: Sequence[Any], loss: Loss) -> float | None:
        """Return the loss of samples of all processes, or None if there are none."""
        return self._sum(loss(samples, None)) if samples else None

    def step(self, optimizer: Optimizer, samples: Sequence[Any], loss: Loss) -> float:
        """Take one optimizer step, and return the loss before it, summed over the samples of all processes.

        If the gradients overflow, they are computed again with a smaller scale, as no sample should be left out.
        """
        while (value := self._set_gradients(samples, loss)) is None:
            if self._scale <= SMALLEST_SCALE:
                raise _NotFiniteError("gradient")
            self._scale /= 16
        optimizer.step()
        with torch.no_grad():
            for trained in self._trained:
                trained.master.grad = None
                if trained.master is not trained.parameter:
                    trained.parameter.copy_(trained.master)
        return value

    def _sum(self, losses: Iterable[float]) -> float:
        """Return the sum over all processes; an error in one of them ends all."""
        with self._processes.fail_together():
            # A Trainer may set the default to 16 bits.
            total = torch.tensor([sum(losses)], dtype=torch.float64)
        self._processes.all_reduce_sum([total])
        return float(total)

    def _set_gradients(self, samples: Sequence[Any], loss: Loss) -> float | None:
        """Give the masters the masked gradients of all processes; return the loss, or None if any is not finite."""
        value = self._sum(loss(samples, self._scale))
        # All processes see the same sum, so they stop together.
        _require_finite("loss", value)
        is_reached = [trained.parameter.grad is not None for trained in self._trained]
        reached = torch.tensor(is_reached, dtype=torch.int64)
        gradients = [trained.take_gradient(self._scale) for trained in self._trained]
        self._processes.all_reduce_sum([reached, *gradients])

        for trained, gradient in zip(self._trained, gradients, strict=True):
            mask_(gradient, trained.keep)
        # A sum is not finite if one of its terms is not, and takes no memory of the size of the gradient.
        if not torch.stack([gradient.sum().isfinite().cpu() for gradient in gradients]).all():
            return None  # no gradient is set: the next backward pass would add to that of a master
        for trained, gradient, times in zip(
            self._trained, gradients, reached.tolist(), strict=True
        ):
            if times or not self._skip_unreached:
                trained.master.grad = gradient
        return value


class _NotFiniteError(Exception): ...


def _require_finite(name: str, loss: float | None) -> None:
    if loss is not None and not math.isfinite(loss):
        raise _NotFiniteError(name)
