"""What surrounds the forward pass of one batch, while the passes of other batches and the scheduler run in turn.

A plain forward pass has PyTorch's state, the context variables and the attributes of the modules to itself. In lockstep
many passes share them, so each batch gets its own back whenever one of its modules runs. PyTorch and greenlet switch
none of these by themselves, and some can only be reached by private names, which stay in this file.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from operator import is_
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn, overrides
from torch.autograd import forward_ad
from torch.utils import _python_dispatch

from wanda_lightning.calibration.cloning import clone_arguments, tensors_within
from wanda_lightning.common.errors import UserError
from wanda_lightning.models import Stop

_Result = TypeVar("_Result")
_ABSENT = object()


class Parked(Protocol):
    """A batch that waits at a stop."""

    stop: int  # the index of this stop, or of the stop at which it waited last

    @property
    def context(self) -> contextvars.Context:
        """Its context variables, in which a function can run."""


@dataclass
class _NoBatch:
    """Stands for the batch of a call outside of lockstep."""

    context: contextvars.Context
    stop: int = -1


@dataclass(frozen=True)
class Surroundings:
    """What surrounds a module that a batch calls: PyTorch's state, the context variables, the attributes of modules."""

    batch: Parked
    state: TorchState
    outside: contextvars.Context  # the context variables around the whole pass
    attributes: ModuleAttributes

    @classmethod
    def present(cls) -> Surroundings:
        """Return what surrounds this call, for a module that runs outside of lockstep."""
        outside = contextvars.copy_context()
        with torch.no_grad():
            return cls(_NoBatch(outside.copy()), TorchState(), outside, ModuleAttributes(None, ()))

    def run(self, function: Callable[[], _Result]) -> _Result:
        """Run a function as a part of the batch's own pass, whose later modules see what it sets."""
        with self.attributes.of(self.batch), self.state.entered():
            return self.batch.context.run(function)

    def try_out(self, function: Callable[[], _Result]) -> _Result:
        """Run a function without gradients, then take back what it has set: the batch does not see it."""
        context = self.batch.context.copy()
        with self.attributes.undone(self.batch), self.state.entered(), torch.no_grad():
            context.run(self._clone_variables)
            return context.run(function)

    def _clone_variables(self) -> None:
        """Clone what the model has set: a module may append to a list, as in transformers for the logits of routers."""
        for variable, value in _set_inside(contextvars.copy_context(), self.outside):
            variable.set(clone_arguments(value))


def _set_inside(
    context: contextvars.Context, outside: contextvars.Context
) -> Iterator[tuple[contextvars.ContextVar[Any], Any]]:
    """Yield the context variables that have another value than outside."""
    for variable, value in context.items():
        if outside.get(variable, _ABSENT) is not value:
            yield variable, value


class Replay:
    """Runs a function again in the surroundings that it first had, as a backward pass does with a block.

    `modules` are those around the block, whose attributes it may read; `outside` are the context variables around the
    whole pass.
    """

    def __init__(self, modules: Sequence[nn.Module], outside: contextvars.Context) -> None:
        self._outside = outside
        self._state = TorchState()
        self._context = contextvars.copy_context()
        self._attributes = [_Attributes(vars(module), set(), dict(vars(module))) for module in modules]

    def tensors(self) -> list[Tensor]:
        """Return the tensors that the model has left for the function, in context variables and attributes."""
        attributes = [value for each in self._attributes for value in each.known.values() if isinstance(value, Tensor)]
        return attributes + tensors_within([value for _, value in _set_inside(self._context, self._outside)])

    def run(self, function: Callable[[], _Result]) -> tuple[_Result, bool]:
        """Run the function, and take back what it sets; also return whether it has set anything."""
        present = [dict(each.present) for each in self._attributes]
        gradients = torch.is_grad_enabled()
        context = self._context.copy()
        try:
            for each in self._attributes:
                each.undo()
            with self._state.entered(exactly=True), torch.set_grad_enabled(gradients):
                result = context.run(function)
            variables = any(True for _ in _set_inside(context, self._context))
            return result, variables or any(each.changes() for each in self._attributes)
        finally:
            for each, values in zip(self._attributes, present, strict=True):
                _Attributes(each.present, set(), values).undo()


class TorchState:
    """The state of PyTorch at the time of construction.

    Gradients, inference mode, autocast, the stream with its device, the default device, and the modes of functions and
    dispatch: a model may change them between two stops, where other samples and the scheduler run.
    """

    def __init__(self) -> None:
        devices = {"cpu"}
        if (accelerator := torch.accelerator.current_accelerator(check_available=True)) is not None:
            devices.add(accelerator.type)
        self._stream = _current_stream()
        self._inference = torch.is_inference_mode_enabled()
        self._gradients = torch.is_grad_enabled()
        self._autocast = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in sorted(devices)]
        self._default_device = torch.get_default_device()
        self._functions, self._dispatch = _modes()

    @contextmanager
    def entered(self, exactly: bool = False) -> Iterator[None]:
        """Switch to this state; restore the present one at the end.

        Torch-function modes that the scheduler has entered stay active, around those of the model, unless the state is
        entered `exactly`.
        """
        with ExitStack() as stack:
            stack.callback(_set_stream, _current_stream())
            _set_stream(self._stream)
            stack.enter_context(torch.inference_mode(self._inference))
            stack.enter_context(torch.set_grad_enabled(self._gradients))

            present = _modes()
            stack.callback(_set_modes, present)
            functions = self._functions if exactly else _nested(present[0], self._functions)
            _set_modes([functions, self._dispatch])

            if self._default_device != torch.get_default_device():
                stack.enter_context(self._default_device)
            for device, enabled, dtype in self._autocast:
                # No cache: it would give the pruned run the cast of a dense weight.
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False))
            yield


def refuse_transforms(name: str) -> None:
    """Refuse a call inside of a transform of `torch.func`: it has a stack of its own, which no other batch may see."""
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        raise UserError(
            f"batches must be able to wait at {name}, or to run it again, but the model calls it inside of a transform "
            "(vmap, grad or jvp of torch.func, or a dual level), which cannot be left and entered again. Leave such "
            "layers out with skip=, or use method='wanda' with sequential='none', which runs the batches one after "
            "another. Inside of vmap, only skip= helps."
        )


def _current_stream() -> torch.Stream | None:
    """Return the current stream, which determines the current device; None before the accelerator is used."""
    accelerator = torch.accelerator.current_accelerator()
    # `mps` has no such function, and a single stream.
    if accelerator is None or not getattr(torch.get_device_module(accelerator), "is_initialized", bool)():
        return None
    return torch.accelerator.current_stream()


def _set_stream(stream: torch.Stream | None) -> None:
    if stream is not None and stream != torch.accelerator.current_stream():
        torch.accelerator.set_stream(stream)  # changes the current device, too


_MODES = (
    (overrides, overrides._get_current_function_mode_stack),
    (_python_dispatch, _python_dispatch._get_current_dispatch_mode_stack),
)


def _modes() -> list[Sequence[Any]]:
    """Return the modes of torch functions and those of dispatch, the innermost last."""
    return [[*read()] for _, read in _MODES]


def _set_modes(modes: Sequence[Sequence[Any]]) -> None:
    for (module, _), current, wanted in zip(_MODES, _modes(), modes, strict=True):
        if current != wanted:
            for _ in current:
                module._pop_mode()
            for mode in wanted:
                module._push_mode(mode)


def _nested(outer: Sequence[Any], inner: Sequence[Any]) -> list[Any]:
    """Return the modes of a scheduler and of a batch, which have begun with the same ones, as nested modes."""
    common = 0
    for one, other in zip(outer, inner, strict=False):
        if one is not other:
            break
        common += 1
    return [*outer, *inner[common:]]


@dataclass(eq=False)
class _Attributes:
    """The attributes of one module that contains stops."""

    present: dict[str, Any]  # the `__dict__` of the module
    stops: set[int]  # inside the module, which no batch has left yet
    known: dict[str, Any]  # a copy of `present` after the latest run
    setters: dict[str, object] = field(default_factory=dict)  # the batch that set an attribute last
    # The value for each batch, of the attributes that several batches have set
    own: dict[str, dict[object, Any]] = field(default_factory=dict)

    def enter(self, batch: object) -> None:
        """Set the values of a batch."""
        for name, values in self.own.items():
            if batch in values:
                _set(self.present, name, values[batch])
                _set(self.known, name, values[batch])

    def changes(self) -> dict[str, Any]:
        """Return the former values of the attributes that were set since the latest run."""
        known, present = self.known, self.present
        if len(known) == len(present) and all(map(is_, known.values(), present.values())):
            return {}
        names = [name for name in {**known, **present} if known.get(name, _ABSENT) is not present.get(name, _ABSENT)]
        return {name: known.get(name, _ABSENT) for name in names}

    def leave(self, batch: object) -> None:
        """Note what a batch has set."""
        if not self.stops:
            return
        for name, former in self.changes().items():
            setter = self.setters.get(name, batch)
            if setter is not batch:
                self.own.setdefault(name, {}).setdefault(setter, former)
            if name in self.own:
                self.own[name][batch] = self.present.get(name, _ABSENT)
            self.setters[name] = batch
            _set(self.known, name, self.present.get(name, _ABSENT))

    def undo(self) -> None:
        """Put back what was set."""
        for name, former in self.changes().items():
            _set(self.present, name, former)


def _set(attributes: dict[str, Any], name: str, value: Any) -> None:
    if value is _ABSENT:
        attributes.pop(name, None)
    else:
        attributes[name] = value


def modules_around(model: nn.Module, modules: Collection[nn.Module]) -> list[nn.Module]:
    """Return the modules of a model that contain at least one of the given modules, without these."""
    inner = {*modules}
    return [each for each in model.modules() if each not in inner and not inner.isdisjoint(each.modules())]


class ModuleAttributes:
    """Keeps a value for each batch of the attributes that the model sets for each, such as `self.scale = x.std()`.

    Only modules that contain stops count: their own code waits while other batches run it. An attribute that only one
    batch sets, such as a mask that is made at the first call, is shared, and so are buffers.
    """

    def __init__(self, model: nn.Module | None, stops: Sequence[Stop]) -> None:
        index_of = {stop.module: index for index, stop in enumerate(stops) if stop.module is not None}
        self._all: list[_Attributes] = []
        self._around: dict[int, list[_Attributes]] = {}  # by stop: of the modules that contain it
        for module in () if model is None else modules_around(model, index_of):
            inside = {index_of[child] for child in module.modules() if child in index_of}
            attributes = _Attributes(vars(module), inside, dict(vars(module)))
            self._all.append(attributes)
            for index in inside:
                self._around.setdefault(index, []).append(attributes)

    def left(self, stop: int) -> None:
        """Forget the values in modules whose last stop the batches have left: nothing in them will wait any more."""
        for attributes in self._around.get(stop, ()):
            attributes.stops.discard(stop)
            if not attributes.stops:
                attributes.own.clear()
                attributes.setters.clear()

    @contextmanager
    def of(self, batch: Parked) -> Iterator[None]:
        """Give the modules the values of a batch, and keep what it sets in this block."""
        before = batch.stop
        self._enter(batch)
        try:
            yield
        finally:
            # Between two stops, the code of the modules around either of them runs.
            for stop in {before, batch.stop}:
                for attributes in self._around.get(stop, ()):
                    attributes.leave(batch)

    @contextmanager
    def undone(self, batch: Parked) -> Iterator[None]:
        """Give the modules the values of a batch, and take back what is set in this block."""
        self._enter(batch)
        try:
            yield
        finally:
            for attributes in self._around.get(batch.stop, ()):
                attributes.undo()

    def _enter(self, batch: Parked) -> None:
        for attributes in self._all:
            if attributes.own:
                attributes.enter(batch)
