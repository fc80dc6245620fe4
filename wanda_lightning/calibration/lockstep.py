"""Run all calibration batches through any model side by side, and wait at each stop.

The model's own forward runs unchanged, once for each batch, each in a greenlet: a call stack that can be left in the
middle of a function and continued later, in the same thread. While the engine is active, the `forward` of the module at
a stop parks the batch that calls it, so the call returns to the scheduler. The scheduler advances each batch until it
is parked or finished, and passes the parked calls of one stop to the caller, which may run them, change weights, or
both. Then the scheduler runs each call, returns the outputs to the batches, and continues. Several processes with their
own batches wait at the same stops.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn, overrides
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils import _python_dispatch

from wanda_lightning.calibration.cloning import clone_arguments
from wanda_lightning.calibration.error_notes import naming_batch
from wanda_lightning.calibration.interception import Product, WeightInterceptor
from wanda_lightning.calibration.mode import patched
from wanda_lightning.calibration.samples import Sample
from wanda_lightning.models import Stop
from wanda_lightning.parallel import SINGLE_PROCESS, Processes

Forward = Callable[..., Any]


@dataclass(frozen=True)
class Call:
    """The call of the module at a stop, where a sample is parked before it runs."""

    sample: Sample
    stop: str  # name of the stop; "" for the whole model
    forward: Forward  # the module's own forward
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    state: TorchState  # of the sample at the call

    def run(self, on_copies: bool = False) -> Any:
        """Run the module and return its output; on clones of its arguments if it will run again on the same values."""
        arguments = self.args, self.kwargs
        with naming_batch(self.sample.batch_index, arguments, self.stop), self.state.entered():
            args, kwargs = clone_arguments(arguments) if on_copies else arguments
            return self.forward(*args, **kwargs)


def whole_model_calls(samples: Iterable[Sample], tick: Callable[[], None] = lambda: None) -> Iterator[Call]:
    """Yield calls of the whole model, each on one sample, which is read when it is its turn; `tick` follows each."""
    state = TorchState()
    for sample in samples:
        yield Call(sample, "", sample.forward, (), {}, state)
        tick()


Stops = Generator[tuple[Stop, list[Call]]]
"""Stops, each with the calls of this process that wait there; these may be replaced."""


def lockstep(
    stops: Sequence[Stop],
    samples: Sequence[Sample],
    processes: Processes = SINGLE_PROCESS,
    revisited: set[str] | None = None,
    to_end: bool = False,
) -> Stops:
    """Yield each stop that a sample reaches, once, with all samples that are parked there.

    If samples are parked at different stops, the first of these in the given order is next. A sample that reaches a
    stop again, because the model calls its module several times, does not wait. After the last stop every sample ends,
    so the rest of the model is not computed. Only one sample continues, up to the next module with a matrix of its own,
    to find out whether the model calls one of these modules again.

    The modules of the stops are disjoint. `revisited` receives the name of every stop that a sample reaches again. With
    `to_end`, the samples run to the end of the model, and wait at each visit of a stop.

    Yields:
        The stops, whose calls are valid until the next one. Closing the generator, or an exception, ends all samples
        and restores the modules.
    """
    revisited = set() if revisited is None else revisited
    pending = set(range(len(stops)))
    with _parking(stops), ExitStack() as ends:
        batches = [_Batch(sample, stops) for sample in _parking_at_products(samples, stops)]
        for batch in batches:
            # In reverse order, as contexts nest: a batch may have entered one inside the context of the batch before.
            ends.callback(batch.end)
        with processes.fail_together():
            for batch in batches:
                batch.advance()
        while True:
            parked = [batch for batch in batches if batch.call is not None]
            index = processes.all_reduce_min(min((batch.stop for batch in parked), default=len(stops)))
            here = [batch for batch in parked if batch.stop == index]
            if index == len(stops):
                return
            calls = [batch.call for batch in here if batch.call is not None]
            if index not in pending:
                revisited.add(stops[index].name)
            if index in pending or to_end:
                yield stops[index], calls
            pending.discard(index)
            if not pending and not to_end:
                if here:
                    _find_revisits(here[0], stops, revisited)
                return
            with processes.fail_together():
                for batch in here:  # parked activations must not outlive the run of the module
                    batch.advance(batch.context.copy().run(calls.pop(0).run))


def _find_revisits(batch: _Batch, stops: Sequence[Stop], revisited: set[str]) -> None:
    """Continue a sample after the last stop, and add to `revisited` the names of the stops that it reaches again.

    ALBERT and looped models apply one block many times. A global hook, which sees the calls of all modules, ends the
    sample at the first module that has a matrix and contains none of a stop, such as the output head.
    """
    inside = {stop.module for stop in stops}

    def end(module: nn.Module, args: object) -> None:
        if getcurrent() is not batch or not inside.isdisjoint(module.modules()):
            return
        if any(parameter.ndim > 1 for parameter in module.parameters()):
            raise GreenletExit

    hook = register_module_forward_pre_hook(end)
    try:
        with suppress(Exception):  # the output of the model does not matter here, so neither do its errors
            while (call := batch.call) is not None:
                batch.advance(call.run())
                if batch.call is None or batch.call.stop in revisited:
                    break
                revisited.add(batch.call.stop)
    finally:
        hook.remove()


@contextmanager
def _parking(stops: Sequence[Stop]) -> Iterator[None]:
    """Replace the forward of the module at every stop, so that samples park there."""
    with ExitStack() as restored:
        for index, stop in enumerate(stops):
            module = stop.module
            assert module is not None
            restored.enter_context(patched(module, "_compiled_call_impl", None))  # it would bypass the forward
            restored.enter_context(patched(module, "forward", partial(_park, index, module.forward)))
        yield


def _parking_at_products(samples: Sequence[Sample], stops: Sequence[Stop]) -> Sequence[Sample]:
    """Park samples also where a model multiplies by the weight of a layer at a stop outside of its forward."""
    index_of = {
        layer: index
        for index, stop in enumerate(stops)
        for layer in stop.layers
        if layer.module is stop.module and layer.expert is None
    }

    def park(products: list[Product], multiply: Callable[[], Tensor]) -> Tensor:
        product = products[0]
        if product.row:
            return multiply()
        return _park(index_of[product.layer], lambda tokens: multiply(), product.tokens)

    def watched(forward: Callable[[], object]) -> object:
        interceptor = WeightInterceptor(index_of, park)  # each sample has its own
        with interceptor if interceptor.watches else nullcontext():
            return forward()

    return [replace(each, forward=partial(watched, each.forward)) for each in samples] if index_of else samples


def _park(stop: int, forward: Forward, *args: Any, **kwargs: Any) -> Any:
    """Park the current batch and return the module's output; run the forward if no batch is running."""
    batch = getcurrent()
    return batch.park(stop, forward, args, kwargs) if isinstance(batch, _Batch) else forward(*args, **kwargs)


class _Batch(greenlet):
    """The forward pass of one sample, which parks at stops.

    Uncaught, `GreenletExit` ends it. Models rarely catch that, because it is no `Exception`.
    """

    def __init__(self, sample: Sample, stops: Sequence[Stop]) -> None:
        super().__init__()
        self.call: Call | None = None  # the call at which the batch is parked; None while it runs and after its end
        self.stop = -1  # index of the stop at which the batch is parked, or was parked last
        self.gr_context = self.context = contextvars.copy_context()  # in which transformers collects router logits
        self._sample, self._stops, self._state, self._ended = sample, stops, TorchState(), False
        self._output: Any = None

    def run(self) -> None:
        """Run the model's forward until its end (called by `advance`)."""
        self._sample.forward()

    def park(self, stop: int, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Wait at a stop for the output of its module (called in the batch)."""
        if self._ended:  # the model caught `GreenletExit`, or calls a module in a `finally` block
            raise GreenletExit
        self._state = TorchState()
        self.stop, self.call = stop, Call(self._sample, self._stops[stop].name, forward, args, kwargs, self._state)
        del args, kwargs
        assert self.parent is not None
        self.parent.switch()
        output, self._output = self._output, None
        return output

    def advance(self, output: Any = None) -> None:
        """Let the batch run to its next stop, or to its end (called by the scheduler)."""
        self.call, self._output, self.parent = None, output, getcurrent()
        del output
        with self._state.entered(function_modes=True):
            self.switch()

    def end(self) -> None:
        """End the batch if it runs."""
        self.call, self._ended = None, True
        if self:
            self.parent = getcurrent()
            with self._state.entered(function_modes=True), suppress(Exception):  # of code that meets `GreenletExit`
                self.throw()


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


class TorchState:
    """The state of PyTorch at the time of construction.

    Inference mode, autocast, the stream with its device, the default device, and the modes of functions and dispatch: a
    model may change them between two stops, where other samples and the scheduler run.
    """

    def __init__(self) -> None:
        devices = {"cpu"}
        if (accelerator := torch.accelerator.current_accelerator(check_available=True)) is not None:
            devices.add(accelerator.type)
        self._stream = _current_stream()
        self._inference = torch.is_inference_mode_enabled()
        self._autocast = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in sorted(devices)]
        self._default_device = torch.get_default_device()
        self._modes = _modes()

    @contextmanager
    def entered(self, function_modes: bool = False) -> Iterator[None]:
        """Switch to this state, without gradients; restore the present one at the end.

        Torch-function modes are only replaced with `function_modes`.
        """
        with ExitStack() as stack:
            stack.callback(_set_stream, _current_stream())
            _set_stream(self._stream)
            stack.enter_context(torch.inference_mode(self._inference))
            stack.enter_context(torch.no_grad())
            current, (functions, dispatch) = _modes(), self._modes
            stack.callback(_set_modes, current)
            _set_modes([functions if function_modes else current[0], dispatch])
            if self._default_device != torch.get_default_device():
                stack.enter_context(self._default_device)
            for device, enabled, dtype in self._autocast:
                # No cache: it would give the pruned run the cast of a dense weight.
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False))
            yield


_MODES = (
    (overrides, overrides._get_current_function_mode_stack),
    (_python_dispatch, _python_dispatch._get_current_dispatch_mode_stack),
)


def _modes() -> list[Sequence[Any]]:
    """Return the modes of torch functions and those of dispatch, the innermost last."""
    return [[*read()] for _, read in _MODES]


def _set_modes(modes: Sequence[Sequence[Any]]) -> None:
    for (module, _), current, own in zip(_MODES, _modes(), modes, strict=True):
        if current != own:
            for _ in current:
                module._pop_mode()
            for mode in own:
                module._push_mode(mode)
