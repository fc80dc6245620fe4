"""Put a model into the state that calibration and pruning need, and restore it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.backends import mha
from torch.nn import Module
from torch.nn.parameter import UninitializedBuffer

from wanda_lightning.calibration.snapshot import ABSENT, Snapshot, set_or_delete
from wanda_lightning.calibration.torch_internals import is_persistent, write_count
from wanda_lightning.common.evaluation_mode import evaluating
from wanda_lightning.core.placeholders import is_unloaded


@contextmanager
def patched(module: Module, name: str, value: object) -> Iterator[None]:
    """Set an attribute of one module inside the `with` statement.

    A `forward` is patched rather than hooked, because no hook can delay, replace or skip it. `__dict__` is used because
    `nn.Module.__setattr__` would register a module as a child.
    """
    attributes = module.__dict__
    before = attributes.get(name, ABSENT)
    attributes[name] = value
    try:
        yield
    finally:
        set_or_delete(attributes, name, before)


@contextmanager
def pruning_mode(model: Module, corrected: Collection[Module] = ()) -> Iterator[RestoredBuffers]:
    """Put the model into `calibration_mode`, without gradients and outside of inference mode.

    The buffers of the state dict are restored at the end, except those of modules that are in `corrected` by then.
    It yields what will be restored, so that a caller can change it.
    """
    with calibration_mode(model), torch.inference_mode(False), torch.no_grad():
        buffers = RestoredBuffers(model)
        try:
            yield buffers
        finally:
            buffers.restore(module for module in buffers.saved if module not in corrected)


class _SavedBuffer(NamedTuple):
    """A buffer of a module, and the values that it is to have again."""

    name: str
    buffer: Tensor
    values: Tensor
    write_count: int

    def restore(self, module: Module) -> None:
        """Restore the buffer, which a forward may have written into, or replaced by another tensor."""
        if write_count(self.buffer) != self.write_count:
            self.buffer.copy_(self.values)
        setattr(module, self.name, self.buffer)


class RestoredBuffers:
    """The buffers of a model that `pruning_mode` restores, with their values."""

    def __init__(self, model: Module) -> None:
        self.saved = {module: _saved_buffers(module) for module in model.modules()}

    def restore(self, modules: Iterable[Module]) -> None:
        """Restore the buffers of some modules."""
        for module in modules:
            for saved in self.saved[module]:
                saved.restore(module)

    @contextmanager
    def changing(self, modules: Iterable[Module]) -> Iterator[None]:
        """Restore the buffers of some modules, which may get new values in this block that will be restored instead."""
        # The others were not in memory, or have none.
        known = [module for module in {*modules} if self.saved[module]]
        self.restore(known)
        yield
        for module in known:
            self.saved[module] = _saved_buffers(module)


def _saved_buffers(module: Module) -> list[_SavedBuffer]:
    """Return a module's own buffers that a forward may write into, and pruning does not, with their present values.

    Weights and biases are pruned, or quantized and large. Buffers outside the state dict are left alone: they are
    caches, and attributes that cannot be restored may describe them.
    """
    saved = []
    for name, buffer in module.named_buffers(recurse=False):
        is_loaded = not (isinstance(buffer, UninitializedBuffer) or is_unloaded(buffer))
        if is_loaded and is_persistent(module, name) and not name.endswith(("weight", "bias")):
            # No copy of an inference tensor: outside inference mode, nothing can write into it.
            values = buffer if buffer.is_inference() else buffer.clone()
            saved.append(_SavedBuffer(name, buffer, values, write_count(buffer)))
    return saved


@contextmanager
def calibration_mode(model: Module) -> Iterator[None]:
    """Switch to evaluation mode, and turn off compiled code, key-value caches, and kernels that fuse several layers."""
    with _PLAIN_CODE, _eager_experts(model), _without_cache(model), evaluating(model):
        yield


@contextmanager
def _without_cache(model: Module) -> Iterator[None]:
    """Turn off key-value caches: a block that runs twice would append its keys twice."""
    with ExitStack() as restored:
        for module in model.modules():
            config: Any = getattr(module, "config", None)
            if hasattr(config, "use_cache"):
                restored.callback(setattr, config, "use_cache", config.use_cache)
                config.use_cache = False
        yield


@contextmanager
def _eager_experts(model: Module) -> Iterator[None]:
    """Let models of transformers multiply by one expert at a time.

    They use views of the parameter then, which `WeightInterceptor` recognizes.
    """
    models: list[Any] = [
        module for module in model.modules() if hasattr(module, "set_experts_implementation")
    ]
    # transformers 5.10 cannot tell what was set before, and no release can set a nested configuration to None again.
    before = Snapshot(vars(each.config) for each in models)
    for each in models:
        each.set_experts_implementation("eager")
    changes = list(before.changes())
    try:
        yield
    finally:
        for change in changes:
            change.undo()


class _PlainCode:
    """Turns off fused and compiled code of PyTorch, for the whole process, while any thread is inside."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads = 0
        self._is_eager = False
        self._restored = ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if self._threads == 0:
                self._restored.callback(
                    mha.set_fastpath_enabled,
                    mha.get_fastpath_enabled(),
                )
                # The fused encoder layer bypasses its layers.
                mha.set_fastpath_enabled(False)
            # Without this module nothing is compiled; compiled code would trace the interception.
            if "torch._dynamo" in sys.modules and not self._is_eager:
                self._restored.enter_context(torch.compiler.set_stance("force_eager"))
                self._is_eager = True
            self._threads += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._threads -= 1
            if self._threads == 0:
                self._is_eager = False
                self._restored.close()


_PLAIN_CODE = _PlainCode()
