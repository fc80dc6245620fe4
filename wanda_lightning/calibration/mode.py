"""Put a model into the state that calibration and pruning need, and restore it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

_EXPERTS = "_experts_implementation_internal"


@contextmanager
def pruning_mode(model: nn.Module) -> Iterator[None]:
    """Put the model into `calibration_mode`, without gradients and outside of inference mode."""
    with calibration_mode(model), torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def calibration_mode(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode, and turn off compiled code, key-value caches, and kernels that fuse several layers.

    Models of transformers multiply by one expert at a time, through views of the parameter that `WeightInterceptor`
    recognizes.
    """
    modes = {module: module.training for module in model.modules()}
    configs: dict[int, Any] = {id(config): config for m in model.modules() if (config := getattr(m, "config", None))}
    caching = [(config, config.use_cache) for config in configs.values() if hasattr(config, "use_cache")]
    # The public property has a setter that also writes into nested configurations.
    experts = [(c, vars(c)[_EXPERTS]) for c in configs.values() if _EXPERTS in getattr(c, "__dict__", {})]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        model.eval()
        for config, _ in caching:
            config.use_cache = False  # a block that runs twice would append its keys twice
        for config, _ in experts:
            setattr(config, _EXPERTS, "eager")
        torch.backends.mha.set_fastpath_enabled(False)  # the fused encoder layer bypasses its layers
        with _uncompiled():
            yield
    finally:
        _restore(modes)
        for config, use_cache in caching:
            config.use_cache = use_cache
        for config, implementation in experts:
            setattr(config, _EXPERTS, implementation)
        torch.backends.mha.set_fastpath_enabled(fast_path)


def _uncompiled() -> AbstractContextManager[Any]:
    """Run modules under `torch.compile` eagerly: compiled code would trace the interception."""
    # Without torch._dynamo, whose import takes seconds, nothing is compiled.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def _restore(modes: Mapping[nn.Module, bool]) -> None:
    """Restore the mode of each module, through its own `train` if it overrides that, as loralib does."""
    for module, mode in modes.items():  # outer modules first: an override may set the modules inside
        overrides = getattr(module.train, "__func__", None) is not nn.Module.train
        if overrides and module.training != mode:
            module.train(mode)
    for module, mode in modes.items():
        module.training = mode
