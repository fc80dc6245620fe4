"""Put a model into the state that calibration needs, and restore it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_EXPERTS = "_experts_implementation_internal"


@contextmanager
def calibration_mode(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode, and turn off key-value caches and kernels that fuse several layers.

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
        yield
    finally:
        _restore(modes)
        for config, use_cache in caching:
            config.use_cache = use_cache
        for config, implementation in experts:
            setattr(config, _EXPERTS, implementation)
        torch.backends.mha.set_fastpath_enabled(fast_path)


def _restore(modes: Mapping[nn.Module, bool]) -> None:
    """Restore the mode of each module, through its own `train` if it overrides that, as loralib does."""
    for module, mode in modes.items():  # outer modules first: an override may set the modules inside
        overrides = getattr(module.train, "__func__", None) is not nn.Module.train
        if overrides and module.training != mode:
            module.train(mode)
    for module, mode in modes.items():
        module.training = mode
