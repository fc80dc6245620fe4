"""Refuse anything but a model, and layers whose weights cannot be read."""

from __future__ import annotations

from torch import nn

from wanda_lightning.common.errors import UserError
from wanda_lightning.models.layers import Layer


def refuse_no_module(model: object, call: str, name: str = "model") -> None:
    """Refuse anything but a module, for example batches; `call` shows where the argument `name` belongs."""
    if not isinstance(model, nn.Module):
        kind = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise UserError(f"{name} must be a torch.nn.Module, but it is {kind}. Call {call}.")


def refuse_no_values(layer: Layer) -> None:
    """Refuse a layer on the meta device."""
    if layer.parameter.is_meta:
        raise UserError(
            f"model must hold its weights, but {layer.name} is on the meta device and has no values. Load the "
            "weights first."
        )
