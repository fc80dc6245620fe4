"""The dense model from which a pruned network learns."""

from __future__ import annotations

import copy
import hashlib
import os

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from wanda_lightning.callbacks.trainer import pruning_target
from wanda_lightning.common.errors import UserError
from wanda_lightning.core.placeholders import is_unloaded
from wanda_lightning.models import is_wrapper, number_of_classes
from wanda_lightning.parallel import local
from wanda_lightning.training.held_zeros import prunable_layers, zeros_of

_PRUNED = 0.01  # share of zeros; weights in 16 bits have a few zeros by chance
_VALUES = 64  # of each tensor, for the fingerprint

Dense = str | os.PathLike[str] | nn.Module | None


def network_of(module: L.LightningModule, name: str | None) -> nn.Module:
    """Return the submodule with this name; by default the module's `pruning_target`, else the module itself."""
    if name is None:
        return pruning_target(module)
    try:
        return module.get_submodule(name)
    except AttributeError as error:
        found = ", ".join(child for child, _ in module.named_children())
        raise MisconfigurationException(
            f"network must name a submodule of {type(module).__name__}, but {name!r} is none. Its parts are {found}."
        ) from error


def dense_model(dense: Dense, pl_module: L.LightningModule, name: str | None) -> nn.Module:
    """Return the dense counterpart of the network with this name in a module, frozen and in eval mode.

    Call it in `setup("fit")`: callbacks prune later, and checkpoints are restored later. The result is not a submodule
    of the LightningModule.
    """
    network = network_of(pl_module, name)
    if dense is None:
        _refuse_pruned(network)
        model = copy.deepcopy(network)
    elif isinstance(dense, nn.Module):
        model = network_of(dense, name) if isinstance(dense, L.LightningModule) else dense
    else:
        model = _load(dense, pl_module)
    _refuse_not_finite(model)
    if dense is not None and (zeros := _zeros_of_pruning(model)):
        rank_zero_warn(f"dense should be the model before pruning, but {zeros}. If it was pruned, give another model.")
    _refuse_shared(model, pl_module)
    _refuse_other_classes(model, network)
    return model.requires_grad_(False).eval()


def move_beside(model: nn.Module, network: nn.Module, device: torch.device) -> None:
    """Move a dense model to a device, and to the dtype in which most of the network is stored."""
    model.to(device)
    own, wanted = (max(each.parameters(), key=lambda weight: weight.numel()).dtype for each in (model, network))
    if own != wanted and own.is_floating_point and wanted.is_floating_point:  # else it is quantized
        model.to(wanted)


def fingerprint(model: nn.Module) -> str:
    """Return a hash of the names and shapes of all parameters, and of some values of each."""
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        values = local(parameter.detach()).flatten()
        values = values[:: max(1, len(values) // _VALUES)].cpu().double()
        found.update(f"{name} {tuple(parameter.shape)}".encode() + values.numpy().tobytes())
    return found.hexdigest()[:16]


def _load(name: str | os.PathLike[str], pl_module: L.LightningModule) -> nn.Module:
    load = getattr(pl_module, "load_dense_model", None)
    if not callable(load):
        raise MisconfigurationException(
            f"dense must be a module, since {type(pl_module).__name__} has no method load_dense_model(name), but it is "
            f"{os.fspath(name)!r}. Load the model and give it, or define the method."
        )
    model = load(name)
    if not isinstance(model, nn.Module):
        raise MisconfigurationException(
            f"{type(pl_module).__name__}.load_dense_model must return a module, but it returned a "
            f"{type(model).__name__}."
        )
    return model


def _refuse_pruned(network: nn.Module) -> None:
    if next(network.parameters(), None) is None:
        raise UserError(
            f"dense must be given, since {type(network).__name__} has no parameters in setup(), when its dense copy is "
            "taken. Give the dense model as a module or by its name."
        )
    if zeros := _zeros_of_pruning(network):
        raise UserError(
            f"dense must be given, since the network is already pruned: {zeros}. Give the model before pruning as a "
            "module or by its name."
        )


def _zeros_of_pruning(model: nn.Module) -> str:
    """Describe the zeros of the first layer that seems to be pruned; empty if there is none."""
    sizes = {layer.name: layer.size for layer in prunable_layers(model)}
    shares = {name: zeros / sizes[name] for name, zeros in zeros_of(model).items()}
    pruned = [name for name, share in shares.items() if _PRUNED <= share < 1]  # some layers are initialized to zero
    return f"{shares[pruned[0]]:.0%} of the weights of {pruned[0]} are zero" if pruned else ""


def _refuse_not_finite(model: nn.Module) -> None:
    if next(model.parameters(), None) is None:
        raise UserError(f"dense must be a model with weights, but {type(model).__name__} has none.")
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise UserError(f"dense must hold its weights, but {name} is on the meta device. Load the weights first.")
        is_plain = parameter.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        if not is_plain or is_wrapper(parameter) or is_unloaded(parameter):
            continue  # quantized, or not there yet
        if not local(parameter.detach()).isfinite().all():
            raise UserError(
                f"dense must have finite weights, but {name} holds NaN or infinity, which would reach every weight of "
                "the model that learns from it. Give another model, or load it in a wider dtype."
            )


def _refuse_shared(model: nn.Module, pl_module: L.LightningModule) -> None:
    own = {id(parameter) for parameter in model.parameters()}
    if shared := [name for name, parameter in pl_module.named_parameters() if id(parameter) in own]:
        raise UserError(
            f"dense must be a model of its own, but {shared[0]} of {type(pl_module).__name__} belongs to it, too: it "
            "would be trained and pruned. Leave dense out, or give copy.deepcopy() of the dense model."
        )


def _refuse_other_classes(model: nn.Module, network: nn.Module) -> None:
    own, wanted = number_of_classes(model), number_of_classes(network)
    if own is not None and wanted is not None and own != wanted:
        raise UserError(
            f"dense must predict the same classes or tokens as the network, but it has {own} and "
            f"{type(network).__name__} has {wanted}. Give the model from which the network was pruned."
        )
