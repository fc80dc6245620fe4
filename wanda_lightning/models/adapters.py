"""Recognize adapters of PEFT, which were trained for the shapes and the order of the layers under them."""

from __future__ import annotations

from torch import nn

from wanda_lightning.models.module_names import named_modules


def adapted_module(model: nn.Module) -> str | None:
    """Return the name of the first module that PEFT has given an adapter, or None if there is none."""
    return next((name for name, m in named_modules(model).items() if getattr(type(m), "adapter_layer_names", ())), None)
