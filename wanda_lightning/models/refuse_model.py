"""Refuse anything but a model, and layers whose weights no process can read or write."""

from __future__ import annotations

from torch import nn
from torch.distributed.tensor import DTensor

from wanda_lightning.common.errors import UserError
from wanda_lightning.models.layers import Layer


def refuse_no_module(model: object, call: str) -> None:
    """Refuse anything but a module, for example batches; `call` shows where the model belongs."""
    if not isinstance(model, nn.Module):
        kind = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise UserError(f"model must be a torch.nn.Module, but it is {kind}. Call {call}.")


def refuse_no_values(layer: Layer) -> None:
    """Refuse a layer on the meta device."""
    if layer.parameter.is_meta:
        raise UserError(
            f"model must hold its weights, but {layer.name} is on the meta device and has no values. Load the "
            "weights first."
        )


def refuse_sharded_experts(layer: Layer) -> None:
    """Refuse experts that are sharded across processes: no process holds all of them."""
    if layer.expert is not None and isinstance(layer.parameter, DTensor):
        module = layer.siblings.removesuffix(".*").removesuffix(f".{layer.parameter_name}").rpartition(".")[2]
        raise UserError(
            f"model must hold all experts of a module in one process, but {layer.siblings} are sharded across "
            "processes. Prune before sharding (devices=1, or DDPStrategy), or leave them dense with "
            f"skip=['*.{module}']."
        )
