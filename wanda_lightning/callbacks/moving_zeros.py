"""Shared by the callbacks that move zeros during training: the pattern of the zeros, and refusals."""

from __future__ import annotations

import math
from collections import Counter

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback

from wanda_lightning.callbacks.keep_zeros import holders
from wanda_lightning.callbacks.pruning import PruningCallback
from wanda_lightning.callbacks.trainer import averaged_models, last_step, processes_of, pruning_target
from wanda_lightning.checks import refuse_pytorch_lightning
from wanda_lightning.core.patterns import Pattern
from wanda_lightning.parallel import is_sharded
from wanda_lightning.zeros import prunable_layers


def pattern_of(holder: Callback, given: Pattern | None, name: str) -> Pattern:
    """Return the pattern of the zeros that a callback holds.

    Args:
        holder: The callback.
        given: The pattern that the user gave.
        name: Class of the callback that moves the zeros.

    Raises:
        MisconfigurationException: If the pattern is neither given nor known.
    """
    if isinstance(holder, PruningCallback):
        return holder.config.pattern
    if given is None:
        raise MisconfigurationException(
            f"pattern of {name} must be given, since {type(holder).__name__} does not know the pattern of the zeros. "
            "Give pattern='unstructured', or N:M such as '2:4'."
        )
    return given


def pruning_has_ended(trainer: L.Trainer) -> bool:
    """Whether all pruning callbacks have reached their final sparsity."""
    return all(callback.is_done for callback, _ in holders(trainer) if isinstance(callback, PruningCallback))


def refuse_in_setup(trainer: L.Trainer, pl_module: L.LightningModule, name: str, pattern: Pattern | None) -> None:
    """Raise an error for a Trainer or module with which zeros cannot move, before a checkpoint is loaded.

    Args:
        trainer: The Trainer.
        pl_module: The module.
        name: Class of the callback that moves the zeros.
        pattern: The pattern that the user gave to it.
    """
    refuse_pytorch_lightning(trainer)
    processes_of(trainer)
    if not (found := [callback for callback, _ in holders(trainer)]):
        raise MisconfigurationException(
            f"{name} moves the zeros that PruningCallback or KeepZeros holds, but the Trainer has neither. Add one."
        )
    for callback in found:
        _refuse_holder(callback, name, pattern)
    if not pl_module.automatic_optimization:
        raise MisconfigurationException(
            f"{name} needs automatic optimization, but {type(pl_module).__name__} calls its optimizers itself. Set "
            "automatic_optimization=True."
        )
    layers = prunable_layers(pruning_target(pl_module))
    if layers and not any(layer.parameter.requires_grad for layer in layers):
        _refuse_frozen(layers[0].name, name)


def refuse_held(trainer: L.Trainer, name: str) -> None:
    """Raise an error if no zeros are held, two callbacks hold the same layer, or a held layer is frozen."""
    layers = [layer for _, zeros in holders(trainer) for layer, _ in zeros.masks()]
    if not layers:
        raise MisconfigurationException(
            f"{name} moves the zeros of a pruned model, but no zeros are held. Prune the model, or load pruned weights."
        )
    if twice := [layer for layer, count in Counter(layer.name for layer in layers).items() if count > 1]:
        raise MisconfigurationException(
            f"{name} needs one callback that holds the zeros of each layer, but two hold those of {twice[0]}. Remove "
            "KeepZeros if a PruningCallback prunes the same layers."
        )
    for layer in layers:
        if not layer.parameter.requires_grad:
            _refuse_frozen(layer.name, name)


def _refuse_holder(holder: Callback, name: str, pattern: Pattern | None) -> None:
    if isinstance(holder, PruningCallback) and not holder.keep_zeros:
        raise MisconfigurationException(
            f"{name} moves zeros that are held, but {type(holder).__name__} has keep_zeros=False. Leave it True."
        )
    own = pattern_of(holder, pattern, name)
    if pattern is not None and (pattern.group_size, pattern.group_kept) != (own.group_size, own.group_kept):
        raise MisconfigurationException(
            f"pattern of {name} must be that of the zeros, but it is {pattern}, and {type(holder).__name__} prunes "
            f"with {own}. Leave it out."
        )


def _refuse_frozen(layer: str, name: str) -> None:
    raise MisconfigurationException(
        f"{name} needs the gradients of the layers whose zeros move, but {layer} is frozen. Call requires_grad_(True) "
        "on its weight; LearnMasks(train_weights=False) keeps the values fixed itself."
    )


def refuse_at_start(trainer: L.Trainer, name: str) -> None:
    """Raise an error for a Trainer that leaves no steps in which zeros can move, or with which they cannot move."""
    if is_sharded(trainer.lightning_module):
        raise MisconfigurationException(
            f"{name} needs a model that each process holds as a whole, but this one is sharded. Use strategy='ddp', or "
            "one device."
        )
    if averaged_models(trainer):
        raise MisconfigurationException(
            f"{name} moves zeros, and averaging weights while zeros move fills them. Remove the callback that averages "
            "weights, or average in a second training with KeepZeros."
        )
    if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in trainer.optimizers):
        raise MisconfigurationException(
            f"{name} needs one backward pass for each optimizer step, but LBFGS makes several. Use another optimizer."
        )
    _refuse_without_steps(trainer, name)


def _refuse_without_steps(trainer: L.Trainer, name: str) -> None:
    end = last_step(trainer)
    if math.isinf(end):
        raise MisconfigurationException(
            f"{name} needs the number of training steps, but the Trainer does not know it. Give the Trainer max_steps, "
            "or max_epochs and a train dataloader with a length."
        )
    for callback, _ in holders(trainer):
        last = callback.schedule.stages[-1][0] if isinstance(callback, PruningCallback) else -1
        if last >= end:
            raise MisconfigurationException(
                f"{name} moves zeros after the last pruning, but that is at optimizer step {last} and training ends at "
                f"{end:.0f}. Prune earlier, or train longer."
            )
