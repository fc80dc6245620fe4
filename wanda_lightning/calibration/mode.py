"""Put a model into the state that calibration and pruning need, and restore it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from wanda_lightning.common.evaluating import evaluating

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
    configs: dict[int, Any] = {id(config): config for m in model.modules() if (config := getattr(m, "config", None))}
    # A block that runs twice would append its keys twice.
    settings: list[tuple[Any, str, object]]
    settings = [(c, "use_cache", False) for c in configs.values() if hasattr(c, "use_cache")]
    # The public property has a setter that also writes into nested configurations.
    settings += [(c, _EXPERTS, "eager") for c in configs.values() if _EXPERTS in getattr(c, "__dict__", {})]
    with ExitStack() as stack:
        for config, name, _ in settings:
            stack.callback(setattr, config, name, getattr(config, name))
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        stack.enter_context(evaluating(model))
        for config, name, value in settings:
            setattr(config, name, value)
        torch.backends.mha.set_fastpath_enabled(False)  # the fused encoder layer bypasses its layers
        if "torch._dynamo" in sys.modules:  # else nothing is compiled; compiled code would trace the interception
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield
