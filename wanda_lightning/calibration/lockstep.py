"""Run all calibration batches through any model together, stopping at each unit.

The model's own forward runs unchanged, once for each batch, each in its own thread. While the engine is active the
`forward` of every unit parks the batch that calls it. Only one thread runs at a time: the scheduler (the caller's
thread) or one batch. The scheduler advances the batches until each is parked or has finished, hands the parked calls of
one unit to the caller, who may run the unit on them, change its weights, or both; then it runs the unit on each call,
hands the output back, and goes on. Where several processes do this together, each with batches of its own, all stop at
the same units.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import FunctionType, ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils._pytree import tree_leaves

from wanda_lightning.parallel import SINGLE_PROCESS, Processes

Forward = Callable[..., Any]


class ThreadState:
    """What PyTorch keeps for each thread and a forward pass depends on: autocast, inference mode, devices."""

    def __init__(self) -> None:
        devices = {"cpu"}
        if torch.accelerator.is_available():
            devices.add(cast(torch.device, torch.accelerator.current_accelerator()).type)
        self._inference = torch.is_inference_mode_enabled()
        self._autocast = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in sorted(devices)]
        self._default_device = torch.get_default_device()
        self._cuda_device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    @contextmanager
    def entered(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self._inference))
            stack.enter_context(torch.no_grad())
            if self._default_device != torch.get_default_device():
                stack.enter_context(self._default_device)
            if self._cuda_device is not None:
                stack.enter_context(torch.cuda.device(self._cuda_device))
            for device, enabled, dtype in self._autocast:
                # No cache: it would hand the cast of a weight from before pruning to the run after it.
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False))
            yield


@dataclass(frozen=True)
class Call:
    """A batch parked at the entry of a unit, with what the unit was called with.

    Attributes:
        batch: Index of the batch.
        args: Positional arguments.
        kwargs: Keyword arguments.
    """

    batch: int
    forward: Forward
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    thread_state: ThreadState

    def run(self) -> Any:
        """Run the unit as the batch would."""
        with self.thread_state.entered():
            return self.forward(*self.args, **self.kwargs)

    def run_on_copies(self) -> bool:
        """Run the unit on copies of what it could write into, and say whether it did (of objects: that it might)."""
        with self.thread_state.entered():
            args, kwargs = clone_arguments((self.args, self.kwargs))
            leaves, own = tree_leaves((args, kwargs)), tree_leaves((self.args, self.kwargs))
            copies = [copy for copy, leaf in zip(leaves, own, strict=True) if copy is not leaf]
            if any(not isinstance(leaf, Tensor) or leaf.is_inference() for leaf in copies):  # these count no writes
                self.forward(*args, **kwargs)
                return True
            before = [leaf._version for leaf in copies]
            self.forward(*args, **kwargs)
            grown = [id(leaf) for leaf in tree_leaves((args, kwargs))] != [id(leaf) for leaf in leaves]
            return grown or before != [leaf._version for leaf in copies]


_DEPTH = 6  # arguments, a cache, its list of layers, a layer, what it has of each sample, a tensor


def clone_arguments(value: Any, known: dict[int, Any] | None = None, depth: int = _DEPTH) -> Any:
    """Arguments whose tensors are clones, also those in objects such as a cache, which are copies.

    Modules, what lies deeper than a cache would, and what cannot be clone_arguments are not.
    """
    known = {} if known is None else known
    if id(value) in known:
        return known[id(value)]
    if isinstance(value, Tensor):
        known[id(value)] = made = value.clone()
        return made
    if depth == 0 or isinstance(value, nn.Module | type | ModuleType | FunctionType):
        return value
    each = partial(clone_arguments, known=known, depth=depth - 1)
    if isinstance(value, tuple):
        return type(value)(*map(each, value)) if hasattr(value, "_fields") else type(value)(map(each, value))
    try:
        known[id(value)] = made = copy.copy(value)
        if made is value:  # as numbers and texts are
            return value
        if isinstance(value, list):
            made[:] = map(each, value)
        elif isinstance(value, dict):
            made.update({key: each(inner) for key, inner in value.items()})
        for name in (*getattr(value, "__dict__", ()), *_slots(type(value))):
            if hasattr(value, name):
                object.__setattr__(made, name, each(getattr(value, name)))
    except Exception:  # a lock, a file, a process group
        known[id(value)] = value
    return known[id(value)]


def _slots(kind: type) -> Iterator[str]:
    for base in kind.__mro__:
        slots = vars(base).get("__slots__", ())
        yield from (slots,) if isinstance(slots, str) else slots


@dataclass(frozen=True)
class Stop:
    """All batches that are parked at one unit.

    Attributes:
        unit: Index of the unit.
        calls: One call for each batch that is there, to be read once; a batch that is elsewhere or done is missing.
            Empty where only batches of other processes are there.
    """

    unit: int
    calls: Iterable[Call]


class _StopForward(BaseException):
    """Ends a batch's thread at its next stop; not an Exception, so that no model catches it."""


class _BatchThread(threading.Thread):
    """One batch on its way through the model."""

    def __init__(self, batch: int, forward: Callable[[], object], thread_state: ThreadState) -> None:
        super().__init__(name=f"calibration batch {batch}", daemon=True)
        self.batch = batch
        self.call: Call | None = None
        self.unit = -1
        self._forward: Callable[[], object] | None = forward
        self._thread_state = thread_state
        self._output: Any = None
        self._error: BaseException | None = None
        self._cancelled = False
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)

    def run(self) -> None:
        """Run the model's forward, between the scheduler's turns."""
        self._go.acquire()
        try:
            if not self._cancelled:
                assert self._forward is not None
                with self._thread_state.entered():
                    self._forward()
        except _StopForward:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self.call = self._forward = None
            self._back.release()

    def park(self, unit: int, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Wait at a unit for its output (called in the batch's thread)."""
        if self._cancelled:  # the model swallowed the end, or called a unit in a `finally`
            raise _StopForward
        self.unit, self.call = unit, Call(self.batch, forward, args, kwargs, ThreadState())
        self._back.release()
        self._go.acquire()
        if self._cancelled:
            raise _StopForward
        output, self._output = self._output, None
        return output

    def advance(self, output: Any = None) -> None:
        """Let the batch go on to its next stop (called in the scheduler's thread)."""
        self.call, self._output = None, output
        del output
        self._go.release()
        self._back.acquire()
        if self._error is not None:
            raise self._error

    def cancel(self) -> None:
        """End the thread, wherever it is."""
        self._cancelled = True
        self._go.release()
        self.join()


def park(unit: int, forward: Forward, *args: Any, **kwargs: Any) -> Any:
    """Run the forward of a unit, or what takes its place; a batch parks there."""
    thread = threading.current_thread()
    if isinstance(thread, _BatchThread):
        return thread.park(unit, forward, args, kwargs)
    return forward(*args, **kwargs)


@contextmanager
def _parking(units: Sequence[nn.Module]) -> Iterator[None]:
    """Wrap the forward of every unit, so that batches park there.

    Of an FSDP2 module the call around it, whose hooks gather the weights: they must not while batches wait. Elsewhere
    the forward itself, so that hooks of the unit run once, and before its inputs are read.
    """
    with ExitStack() as restored:
        for index, unit in enumerate(units):
            if isinstance(unit, FSDPModule):
                restored.enter_context(patched(unit, "_compiled_call_impl", None))  # it would go past `_call_impl`
                restored.enter_context(patched(unit, "_call_impl", partial(park, index, unit._call_impl)))
            else:
                restored.enter_context(patched(unit, "forward", partial(park, index, unit.forward)))
        yield


@contextmanager
def patched(module: nn.Module, name: str, value: object) -> Iterator[None]:
    """An attribute of the instance, and then what was there before."""
    missing = object()
    before = module.__dict__.get(name, missing)
    module.__dict__[name] = value
    try:
        yield
    finally:
        if before is missing:
            del module.__dict__[name]
        else:
            module.__dict__[name] = before


def lockstep(
    forwards: Sequence[Callable[[], object]], units: Sequence[nn.Module], processes: Processes = SINGLE_PROCESS
) -> Iterator[Stop]:
    """Stop once at each unit that a batch reaches, with all batches that are there.

    After a stop, the unit runs with the weights that it then has, and the batches go on. A batch that comes to a unit
    again (shared weights) runs through it. After the last unit every batch ends where it is: nothing behind it is
    computed. Batches may be at different units; the first unit in the given order is next.

    Args:
        forwards: One forward pass for each batch.
        units: Disjoint modules, in the order in which a tie between waiting units is decided.
        processes: Those that run the same units, each with its own forward passes.

    Yields:
        The stops. Closing the generator, or an exception, ends all threads and restores the modules.

    Raises:
        BaseException: What a forward pass raises, with its own traceback.
    """
    thread_state = ThreadState()
    batch_threads = [_BatchThread(batch, forward, thread_state) for batch, forward in enumerate(forwards)]
    pending = set(range(len(units)))
    with _parking(units):
        try:
            with processes.fail_together():
                for batch_thread in batch_threads:
                    batch_thread.start()
                    batch_thread.advance()
            while (unit := processes.all_reduce_min(_first_unit(batch_threads, len(units)))) < len(units):
                here = [
                    batch_thread
                    for batch_thread in batch_threads
                    if batch_thread.call is not None and batch_thread.unit == unit
                ]
                if unit in pending:
                    yield Stop(unit, tuple(cast(Call, batch_thread.call) for batch_thread in here))
                    pending.remove(unit)
                    if not pending:
                        return
                with processes.fail_together():
                    for batch_thread in here:
                        batch_thread.advance(cast(Call, batch_thread.call).run())
        finally:
            # Last in, first out, as if one thread had run them: a model may hold a process-wide context around a unit.
            for batch_thread in reversed(batch_threads):
                if batch_thread.is_alive():
                    batch_thread.cancel()


def _first_unit(batch_threads: Sequence[_BatchThread], default: int) -> int:
    return min((batch_thread.unit for batch_thread in batch_threads if batch_thread.call is not None), default=default)


def whole_model_stop(forwards: Iterable[Callable[[], object]]) -> Stop:
    """The stop before the whole model: each batch at its entry, nothing computed yet, drawn one by one."""
    thread_state = ThreadState()
    return Stop(0, (Call(batch, forward, (), {}, thread_state) for batch, forward in enumerate(forwards)))
