"""What a model needs around it to be calibrated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from torch import nn

_EXPERTS = "_experts_implementation_internal"


@contextmanager
def calibration_mode(model: nn.Module) -> Iterator[None]:
    """The model as calibration needs it: evaluation mode, no key-value cache, no layers fused into one kernel.

    Experts multiply one after the other, by views of their parameter: see `products.WeightInterceptor`.
    """
    training = [module for module in model.modules() if module.training]
    configs: dict[int, Any] = {id(config): config for m in model.modules() if (config := getattr(m, "config", None))}
    caching = [(config, config.use_cache) for config in configs.values() if hasattr(config, "use_cache")]
    # Not by the property without the last word, whose setter also writes into the configurations inside.
    experts = [(c, vars(c)[_EXPERTS]) for c in configs.values() if _EXPERTS in getattr(c, "__dict__", {})]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        model.eval()
        for config, _ in caching:
            config.use_cache = False  # a block that runs twice would append its keys twice
        for config, _ in experts:
            setattr(config, _EXPERTS, "eager")
        torch.backends.mha.set_fastpath_enabled(False)  # the fused encoder layer reads weights past its layers
        yield
    finally:
        for module in training:
            module.training = True
        for config, use_cache in caching:
            config.use_cache = use_cache
        for config, implementation in experts:
            setattr(config, _EXPERTS, implementation)
        torch.backends.mha.set_fastpath_enabled(fast_path)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
