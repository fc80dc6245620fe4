"""The interface of a recovery, and the loop that all of them train with, in one process or several."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from wanda_lightning.calibration.lockstep import Call
from wanda_lightning.calibration.samples import Samples
from wanda_lightning.core.masking import mask_
from wanda_lightning.models import Layer, Stop
from wanda_lightning.parallel import SINGLE_PROCESS, Processes
from wanda_lightning.report import TrainedPart, Training, TrainingPass
from wanda_lightning.training.held_zeros import keep_masks

_Item = TypeVar("_Item")
Loss = Callable[[Sequence[Any], float | None], Iterable[float]]  # see `MaskedWeights.fit`
# Small gradients are zero in float16, and large ones infinite. Powers of two leave other dtypes unchanged.
LARGEST_SCALE = 2.0**16
SMALLEST_SCALE = 2.0**-16


class BlockRecovery:
    """The recovery of one block. The base class records nothing and trains nothing."""

    def record(self, calls: Iterable[Call]) -> Iterable[Call]:
        """Return calls of the dense block that record what training needs when each is run once."""
        return calls

    def train(self, show: Callable[[str], None]) -> Iterator[tuple[TrainedPart, Sequence[Layer]]]:
        """Train the kept weights of the pruned block; `show` the name of each part, and yield it with its layers."""
        return iter(())


@dataclass(frozen=True)
class DenseModel:
    """A model before any layer is pruned, and the data to train it on."""

    model: nn.Module
    layers: Sequence[Layer]  # that will be pruned
    blocks: Sequence[nn.Module]  # that contain these layers
    data: Samples
    processes: Processes
    progress: bool


class ModelRecovery:
    """The recovery of a whole model. The base class trains nothing."""

    def train(self) -> Training | None:
        """Train the kept weights of the pruned model; return what happened, or None if nothing was trained."""
        return None


class Recovery:
    """Trains the kept weights of each pruned block, of the whole model at the end, or both."""

    reads_batches: ClassVar[bool] = False  # whether it runs the calibration batches itself

    @property
    def needs(self) -> frozenset[str]:
        """The statistics that it reads. To train blocks it reads batches, which any statistic requires."""
        return frozenset({"square_sum"} if self.trains_blocks else ())

    @property
    def trains_blocks(self) -> bool:
        """Whether it records the hidden states of each token, to train blocks."""
        return False

    def for_model(self, is_image: bool, sequential: str) -> Recovery:
        """Return the recovery for a model."""
        return self

    def why_not(self, sequential: str) -> str | None:
        """Return why it cannot be combined with a value of `sequential`, and what to do; None if it can be."""
        if sequential != "layer" or not self.trains_blocks:  # stops are then single layers
            return None
        return "the recovery trains the parts of whole blocks. Use sequential='block' or 'none', or another recovery."

    def start(self, stop: Stop, processes: Processes = SINGLE_PROCESS) -> BlockRecovery:
        """Start the recovery at a stop that is still dense."""
        return BlockRecovery()

    def start_model(self, dense: DenseModel) -> ModelRecovery:
        """Start the recovery of a whole model before any layer is pruned."""
        return ModelRecovery()


@dataclass(frozen=True)
class NoRecovery(Recovery):
    """Leave the weights as the solver computed them."""


def hold_out(
    batches: Sequence[Sequence[_Item]], every: int, processes: Processes
) -> tuple[list[_Item | None], ...]:
    """Return the samples of all processes to train on (None for those of others), and every n-th one, held out.

    The order depends on the batches alone: batch i of all processes precedes batch i + 1 of any.
    """
    order: list[_Item | None] = []
    longest = max(number for (number,) in processes.all_gather([len(batches)]))
    sizes = processes.all_gather([len(batch) for batch in batches] + [0] * (longest - len(batches)))
    for index in range(longest):
        for rank in range(processes.world_size):
            order += (
                batches[index]
                if rank == processes.rank and index < len(batches)
                else [None] * sizes[rank][index]
            )
    return [sample for number, sample in enumerate(order, start=1) if number % every], order[
        every - 1 :: every
    ]


class MaskedWeights(AbstractContextManager["MaskedWeights"]):
    """The trained parameters of a pruned module: where a pruned layer is not zero, and all others as a whole.

    Inside a `with` block, only these parameters have gradients. At its end, also after an error, they get their best
    values (see `fit`), and all flags and gradients of the module are restored.

    An optimizer updates the masters: the parameters themselves, or copies in float32, since bfloat16 would lose small
    steps. All processes train copies of the module together, each on its own samples. With `skip_unreached`, the
    optimizer skips a parameter that no sample of a step reaches; otherwise its gradient is 0.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Sequence[Tensor],
        layers: Sequence[Layer],
        processes: Processes,
        skip_unreached: bool = False,
    ) -> None:
        self._parameters = parameters
        self._processes = processes
        self._skip_unreached = skip_unreached
        everything = dict.fromkeys((*module.parameters(), *parameters))
        self._before = [
            (parameter, parameter.requires_grad, parameter.grad) for parameter in everything
        ]
        kept = keep_masks(layers, other_entries=False)
        self._keep = [
            kept[p] if p in kept else torch.ones_like(p, dtype=torch.bool) for p in parameters
        ]
        self._masters = [_master(parameter) for parameter in parameters]
        self._keep_best()
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
        kept = (
            master.detach()[keep] for master, keep in zip(self._masters, self._keep, strict=True)
        )
        # Of none, the mean is NaN.
        sizes = (float(weights.square().mean().sqrt().nan_to_num()) for weights in kept)
        pairs = zip(self._masters, sizes, strict=True)
        return [{"params": [master], "lr": learning_rate * size} for master, size in pairs]

    def fit(
        self,
        optimizer: torch.optim.Optimizer,
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
        count = 0
        found = [TrainingPass(None, lowest)]
        try:
            _require_finite("held-out loss", lowest if stops_early else None)
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
                found.append(TrainingPass(sum(losses) / len(losses), after))
                if falls:
                    lowest = after
                    self._keep_best()
        except _NotFiniteError as error:
            return found, f"the {error} of step {count + 1} was not finite"
        return found, ""

    def evaluate(self, samples: Sequence[Any], loss: Loss) -> float | None:
        """Return the loss of samples of all processes, or None if there are none."""
        return self._sum(loss(samples, None)) if samples else None

    def step(self, optimizer: torch.optim.Optimizer, samples: Sequence[Any], loss: Loss) -> float:
        """Take one optimizer step, and return the loss before it, summed over the samples of all processes.

        If the gradients overflow, they are computed again with a smaller scale, as no sample should be left out.
        """
        while (value := self._set_gradients(samples, loss)) is None:
            if self._scale <= SMALLEST_SCALE:
                raise _NotFiniteError("gradient")
            self._scale /= 16
        optimizer.step()
        with torch.no_grad():
            for parameter, master in zip(self._parameters, self._masters, strict=True):
                master.grad = None
                if master is not parameter:
                    parameter.copy_(master)
        return value

    def _sum(self, losses: Iterable[float]) -> float:
        """Return the sum over all processes; an error in one of them ends all."""
        total = torch.zeros(1, dtype=torch.float64)  # a Trainer may set the default to 16 bits
        with self._processes.fail_together():
            for loss in losses:
                total += loss
        self._processes.all_reduce_sum([total])
        return float(total)

    def _keep_best(self) -> None:
        self._best = [parameter.detach().clone() for parameter in self._parameters]

    def _set_gradients(self, samples: Sequence[Any], loss: Loss) -> float | None:
        """Give the masters the masked gradients of all processes; return the loss, or None if any is not finite."""
        value = self._sum(loss(samples, self._scale))
        _require_finite("loss", value)
        reached = torch.tensor(
            [parameter.grad is not None for parameter in self._parameters], dtype=torch.int64
        )
        gradients = []  # unscaled, in the dtype of the master
        for parameter, master in zip(self._parameters, self._masters, strict=True):
            gradient = parameter.grad
            parameter.grad = None
            own = (
                torch.zeros_like(master)
                if gradient is None
                else gradient.to(master.dtype).contiguous()
            )
            gradients.append(own.div_(self._scale))
        self._processes.all_reduce_sum([reached, *gradients])
        for gradient, keep in zip(gradients, self._keep, strict=True):
            mask_(gradient, keep)
        if not torch.stack([gradient.sum().isfinite().cpu() for gradient in gradients]).all():
            return None  # no gradient is set: the next backward pass would add to that of a master
        for master, gradient, is_reached in zip(
            self._masters, gradients, reached.tolist(), strict=True
        ):
            master.grad = gradient if is_reached or not self._skip_unreached else None
        return value


class _NotFiniteError(Exception): ...


def _require_finite(name: str, loss: float | None) -> None:
    if loss is not None and not math.isfinite(loss):
        raise _NotFiniteError(name)


def _master(parameter: Tensor) -> Tensor:
    wide = torch.promote_types(parameter.dtype, torch.float32)
    # Fused AdamW of PyTorch 2.13 ignores strides.
    is_master = parameter.dtype == wide and parameter.is_contiguous()
    return parameter if is_master else parameter.detach().to(wide).contiguous()
