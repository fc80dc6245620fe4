"""Names of modules and parameters, also inside modules under `torch.compile`; and of modules with adapters."""

from __future__ import annotations

from torch import nn

_COMPILED = "_orig_mod"  # where `torch.compile` keeps the module that it wraps


def uncompiled_name(name: str) -> str:
    """Return the name that a module or parameter would have without `torch.compile`."""
    return ".".join(part for part in name.split(".") if part != _COMPILED)


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return all modules by name, without the wrappers of `torch.compile` and their parts of the names."""
    return {uncompiled_name(name): m for name, m in model.named_modules() if _COMPILED not in m._modules}


def adapted_module(model: nn.Module) -> str | None:
    """Return the name of the first module that PEFT has given an adapter, or None if there is none."""
    return next((name for name, m in named_modules(model).items() if getattr(type(m), "adapter_layer_names", ())), None)
