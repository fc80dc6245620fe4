"""Put a model into the state that calibration and pruning need, and restore it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer

from wanda_lightning.common.evaluation_mode import evaluating
from wanda_lightning.core.placeholders import is_unloaded

_EXPERTS = "_experts_implementation_internal"


@contextmanager
def patched(module: nn.Module, name: str, value: object) -> Iterator[None]:
    """Set an attribute in the `__dict__` of one module in this block.

    No hook of `nn.Module` can delay, replace or skip a forward, and `nn.Module.__setattr__` would register a module.
    """
    own = module.__dict__
    before = {name: own[name]} if name in own else {}
    own[name] = value
    try:
        yield
    finally:
        del own[name]
        own.update(before)


class RestoredBuffers:
    """Buffers."""

    def __init__(self, changing: Callable[..., AbstractContextManager[None]]) -> None:
        self.changing = changing


@contextmanager
def pruning_mode(
    model: nn.Module, corrected: Collection[nn.Module] = ()
) -> Iterator[RestoredBuffers]:
    """Put the model into `calibration_mode`, without gradients and outside of inference mode.

    The buffers of the state dict are restored at the end, except those of modules that are in `corrected` by then.
    It yields `changing`: inside `with changing(modules):`, buffers are restored, and may get new values to restore.
    """
    with calibration_mode(model), torch.inference_mode(False), torch.no_grad():
        before = {module: _saved_buffers(module) for module in model.modules()}

        def restore(modules: Iterable[nn.Module]) -> None:
            for owner, name, buffer, written in (
                (each, *saved) for each in modules for saved in before[each]
            ):
                if written is not None and buffer._version != written[1]:
                    buffer.copy_(written[0])
                setattr(owner, name, buffer)  # the forward may have set another

        @contextmanager
        def changing(modules: Iterable[nn.Module]) -> Iterator[None]:
            # The others were not in memory, or have none.
            known = [module for module in {*modules} if before[module]]
            restore(known)
            yield
            before.update((module, _saved_buffers(module)) for module in known)

        try:
            yield RestoredBuffers(changing)
        finally:
            restore(module for module in before if module not in corrected)


def _saved_buffers(module: nn.Module) -> list[tuple[str, Tensor, tuple[Tensor, int] | None]]:
    """Return a module's own buffers that a forward may write into, and pruning does not, with their present values.

    Weights and biases are pruned, or quantized and large. A buffer outside the state dict is a cache: an attribute that
    cannot be restored may describe it.
    """
    return [
        (name, buffer, None if buffer.is_inference() else (buffer.clone(), buffer._version))
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
        and not (
            name.endswith(("weight", "bias"))
            or isinstance(buffer, UninitializedBuffer)
            or is_unloaded(buffer)
        )
    ]


@contextmanager
def calibration_mode(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode, and turn off compiled code, key-value caches, and kernels that fuse several layers.

    Models of transformers multiply by one expert at a time, through views of the parameter that `WeightInterceptor`
    recognizes.
    """
    configs: dict[int, Any] = {
        id(config): config for m in model.modules() if (config := getattr(m, "config", None))
    }
    # A block that runs twice would append its keys twice.
    settings: list[Any] = [
        (c, "use_cache", False) for c in configs.values() if hasattr(c, "use_cache")
    ]
    # The public property has a setter that also writes into nested configurations.
    settings += [
        (c, _EXPERTS, "eager") for c in configs.values() if _EXPERTS in getattr(c, "__dict__", {})
    ]
    with ExitStack() as stack:
        for config, name, _ in settings:
            stack.callback(setattr, config, name, getattr(config, name))
        stack.enter_context(_PLAIN_CODE)
        stack.enter_context(evaluating(model))
        for config, name, value in settings:
            setattr(config, name, value)
        yield


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
                    torch.backends.mha.set_fastpath_enabled,
                    torch.backends.mha.get_fastpath_enabled(),
                )
                # The fused encoder layer bypasses its layers.
                torch.backends.mha.set_fastpath_enabled(False)
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
