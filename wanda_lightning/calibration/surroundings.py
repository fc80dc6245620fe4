"""Keep apart what surrounds the forward passes of batches that run in turn.

A plain forward pass has PyTorch's state and the context variables to itself. In lockstep many passes share them, and
neither PyTorch nor greenlet switches them. So this file restores each batch's own whenever the batch continues or one
of its modules runs. What a model keeps elsewhere is not kept apart: `lockstep_check.py` finds out whether it does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import Context, copy_context
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch.backends import cuda

from wanda_lightning.calibration.interception import WeightInterceptor
from wanda_lightning.calibration.torch_internals import (
    active_modes,
    inside_transform,
    set_active_modes,
)
from wanda_lightning.calibration.trees import clone_arguments
from wanda_lightning.common.errors import UserError

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Surroundings:
    """The surroundings of a call of a module: PyTorch's state and context variables."""

    context: Context  # the variables of the pass, in which its later modules run, too
    state: TorchState
    outside: Context  # the context variables around the whole pass

    @classmethod
    def present(cls) -> Surroundings:
        """Return what surrounds this call, for a module that runs outside of lockstep."""
        outside = copy_context()
        with torch.no_grad():
            return cls(outside.copy(), TorchState(), outside)

    def run(self, function: Callable[[], _Result]) -> _Result:
        """Run a function as a part of the batch's own pass, whose later modules see what it sets."""
        with self.state.entered():
            return self.context.run(function)

    def try_out(self, function: Callable[[], _Result]) -> _Result:
        """Run a function without gradients, then take back what it has set: the batch does not see it."""
        context = self.context.copy()
        with self.state.entered(), torch.no_grad():
            context.run(self._clone_variables)
            return context.run(function)

    def _clone_variables(self) -> None:
        """Clone what the model has set: a module may append to a list, as in transformers for the logits of routers."""
        for variable, value in copy_context().items():
            if self.outside.get(variable) is not value:
                variable.set(clone_arguments(value))


class Replay:
    """Runs a function in the surroundings of its construction, as a backward pass does with a block that ran before."""

    def __init__(self) -> None:
        self._state = TorchState()
        self._context = copy_context()

    def run(self, function: Callable[[], _Result]) -> _Result:
        """Run the function, and take back the variables that it sets."""
        gradients = torch.is_grad_enabled()
        with self._state.entered(exactly=True), torch.set_grad_enabled(gradients):
            return self._context.copy().run(function)


class TorchState:
    """The state of PyTorch at the time of construction.

    Gradients, inference mode, autocast, the default dtype, the kernels of attention, and the modes of functions (with
    the default device): a model may change them between two stops, where other samples and the scheduler
    run. No library whose models are tested changes another state there, such as the stream.
    """

    def __init__(self) -> None:
        devices = ["cpu"]
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        if accelerator:
            devices.append(accelerator.type)
        self._inference = torch.is_inference_mode_enabled()
        self._gradients = torch.is_grad_enabled()
        self._autocast = [_present_autocast(device) for device in devices]
        self._settings = [read() for read, _ in _SETTINGS]
        self._functions = active_modes()

    @contextmanager
    def entered(self, exactly: bool = False) -> Iterator[None]:
        """Switch to this state; restore the present one at the end.

        Torch-function modes that the scheduler has entered stay active, around those of the model, unless the state is
        entered `exactly`.
        """
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self._inference))
            stack.enter_context(torch.set_grad_enabled(self._gradients))

            for (read, write), value in zip(_SETTINGS, self._settings, strict=True):
                stack.callback(write, read())
                write(value)

            present = active_modes()
            stack.callback(set_active_modes, present)
            functions = self._functions if exactly else _nested(present, self._functions)
            set_active_modes(functions)

            for autocast in self._autocast:
                stack.enter_context(autocast())
            yield


def _present_autocast(device: str) -> Callable[[], torch.autocast]:
    """Return what makes a context with the present autocast of a device.

    It has no cache, which would give the pruned run the cast of a dense weight.
    """
    dtype = torch.get_autocast_dtype(device)
    enabled = torch.is_autocast_enabled(device)
    return partial(torch.autocast, device, dtype, enabled, cache_enabled=False)


def refuse_transforms(name: str) -> None:
    """Refuse a call inside of a transform of `torch.func`: it has a stack of its own, which no other batch may see."""
    if inside_transform():
        raise UserError(
            f"batches must be able to wait at {name}, or to run it again, but the model calls it inside of a transform "
            "(vmap, grad or jvp of torch.func), which cannot be left and entered again. Leave such layers out with "
            "skip=, or use method='wanda' with sequential='none', which runs the batches one after another. Inside of "
            "vmap, only skip= helps."
        )


# Functions that read and write settings of the whole process.
_SETTINGS: tuple[tuple[Callable[[], Any], Callable[[Any], object]], ...] = (
    (torch.get_default_dtype, torch.set_default_dtype),
    (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
    (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
    (cuda.math_sdp_enabled, cuda.enable_math_sdp),
    (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
)


def _nested(outer: Sequence[Any], inner: Sequence[Any]) -> list[Any]:
    """Return the modes of a scheduler and of a batch, which have begun with the same ones, as nested modes.

    The interceptor of a batch parks it at products between its stops; it has nothing to do inside of one.
    """
    common = 0
    for outer_mode, inner_mode in zip(outer, inner, strict=False):
        if outer_mode is not inner_mode:
            break
        common += 1
    of_batch = [mode for mode in inner[common:] if not isinstance(mode, WeightInterceptor)]
    return [*outer, *of_batch]
