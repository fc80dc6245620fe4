"""Put a model into the state that calibration and pruning need, and restore it."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.backends import mha
from torch.nn import Module

from wanda_lightning.common.aliases import Kwargs
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
    with _plain_code(), _plain_configuration(model), evaluating(model):
        yield


@contextmanager
def _plain_configuration(model: Module) -> Iterator[None]:
    """Turn off key-value caches, and let models of transformers multiply by one expert at a time.

    A block that runs twice would append its keys twice. With one expert at a time, models use views of the parameter,
    which `WeightInterceptor` recognizes.
    """
    with_experts: list[Any] = [
        module for module in model.modules() if hasattr(module, "set_experts_implementation")
    ]
    with ExitStack() as restored:
        # transformers 5.10 cannot tell what was set, and no release can set a nested configuration to None again.
        for module in with_experts:
            restored.callback(_restore, module.config, dict(vars(module.config)))
        for module in with_experts:
            module.set_experts_implementation("eager")
        for module in model.modules():
            config: Any = getattr(module, "config", None)
            if hasattr(config, "use_cache"):
                restored.callback(setattr, config, "use_cache", config.use_cache)
                config.use_cache = False
        yield


def _restore(config: object, attributes: Kwargs) -> None:
    vars(config).clear()
    vars(config).update(attributes)


@contextmanager
def _plain_code() -> Iterator[None]:
    """Turn off fused and compiled code of PyTorch, for the whole process."""
    with ExitStack() as restored:
        restored.callback(mha.set_fastpath_enabled, mha.get_fastpath_enabled())
        # The fused encoder layer bypasses its layers.
        mha.set_fastpath_enabled(False)
        # Without this module nothing is compiled; compiled code would trace the interception.
        if "torch._dynamo" in sys.modules:
            restored.enter_context(torch.compiler.set_stance("force_eager"))
        yield
