"""Put a model into the state that calibration and pruning need, and restore it."""

import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.backends import mha
from torch.nn import Module

from wanda_lightning.common.evaluation_mode import evaluating


@contextmanager
def patched(module: Module, name: str, value: object) -> Iterator[None]:
    """Set an attribute of one module inside the `with` statement.

    A `forward` is patched rather than hooked, because no hook can delay, replace or skip it. `__dict__` is used because
    `nn.Module.__setattr__` would register a module as a child.
    """
    attributes = module.__dict__
    before = {name: attributes[name]} if name in attributes else {}
    attributes[name] = value
    try:
        yield
    finally:
        attributes.pop(name, None)
        attributes.update(before)


@contextmanager
def pruning_mode(model: Module) -> Iterator[None]:
    """Put the model into `calibration_mode`, without gradients and outside of inference mode."""
    with calibration_mode(model), torch.inference_mode(False), torch.no_grad():
        yield


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
    before = [dict(vars(each.config)) for each in models]
    for each in models:
        each.set_experts_implementation("eager")
    try:
        yield
    finally:
        for each, attributes in zip(models, before, strict=True):
            vars(each.config).clear()
            vars(each.config).update(attributes)


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
