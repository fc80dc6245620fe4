"""Train a network to predict like its dense counterpart."""

import copy
import functools
import inspect
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from wanda_lightning.calibration.pruning_mode import patched
from wanda_lightning.calibration.torch_internals import is_compiled
from wanda_lightning.calibration.trees import clone_arguments
from wanda_lightning.callbacks.prunable_module import pruning_target
from wanda_lightning.callbacks.trainer import processes_of
from wanda_lightning.common.aliases import Forward, Kwargs, StrPath
from wanda_lightning.common.checks import Number, check
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.float64 import widened
from wanda_lightning.common.text_features import as_encoded
from wanda_lightning.core.losses import summed_divergence
from wanda_lightning.models import (
    causal_config,
    find_layers,
    find_predictions,
    fitting_mask,
    has_classes,
    has_vectors,
    token_masks,
)

# The share from which a layer seems pruned; weights in 16 bits have a few zeros by chance.
_SHARE_OF_ZEROS = 0.01

Dense = StrPath | nn.Module | None


class DistillFromDense(Callback):
    """Train a pruned network to predict like the dense one, in any `trainer.fit` (Hinton et al. 2015).

    The loss of each training step becomes `(1 - weight) * loss + weight * T^2 * KL(dense || network)`, where `loss` is
    the module's own, and the divergence between the predictions at temperature T is averaged over all predictions,
    without padding (as an `attention_mask` shows it). For vectors, such as sentence embeddings, the mean squared error
    replaces the divergence. It is logged as `distillation_loss`. The callback takes the
    predictions from every call of the network in `training_step` that has gradients, and runs the dense model on the
    same inputs, without gradients or dropout. Use it with `PruningCallback` or `KeepZeros`, which keep the zeros, or
    with adapters. The recovery `Distill` instead trains on the calibration batches while `prune` runs.

    Args:
        dense: The dense model: a module (of a LightningModule, the network in it); or a name that our modules load,
            such as a hub id or a folder. It is frozen, and moved to the device and dtype of the network. By default a
            copy of the network, made when `fit` starts, before anything is pruned or a checkpoint is restored.
        weight: Share of the divergence in the loss, above 0 and at most 1.
        temperature: Divides the logits of both models; above 1, unlikely classes count more.
        network: Name of the submodule whose predictions are compared; by default the module's `pruning_target` if it
            has one (our modules do), else the module itself.

    Raises:
        ValueError: If a value is out of range. When `fit` starts: if the network is already pruned and no `dense` is
            given, or `dense` shares parameters with the module, or differs from that of the resumed run. In the first
            step: if there are no logits to compare.
        MisconfigurationException: When `fit` starts: if the module optimizes manually, or is compiled with its
            `training_step`. In the first step: if `training_step` does not call the network.
    """

    def __init__(
        self,
        dense: Dense = None,
        weight: float = 0.5,
        temperature: float = 1.0,
        network: str | None = None,
    ) -> None:
        self.dense = dense
        self.weight = weight
        self.temperature = temperature
        self.network = network
        check(self, weight=Number(above=0, maximum=1), temperature=Number(above=0))
        self._teacher: nn.Module | None = None  # while it trains
        self._patches = ExitStack()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find or copy the dense model before `fit` changes the network."""
        processes_of(trainer)
        if stage != "fit":
            return
        self.on_train_end()  # an earlier fit may have been interrupted

        name = type(pl_module).__name__
        network = network_of(pl_module, self.network)
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"DistillFromDense adds to the loss that training_step returns, but {name} optimizes manually. Set "
                "automatic_optimization=True."
            )
        # Neither library has a public way to ask whether a module is compiled.
        if pl_module._compiler_ctx is not None or is_compiled(network):
            raise MisconfigurationException(
                f"DistillFromDense watches the calls of the network, which the compiled code of {name} hides. Wrap the "
                "network alone, as in module.model = torch.compile(module.model)."
            )

        self._teacher = dense_model(self.dense, pl_module, self.network)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move the dense model beside the network, and add to the loss of each step from now on."""
        teacher = self._teacher
        network = network_of(pl_module, self.network)
        assert teacher is not None

        teacher.to(pl_module.device)
        dtypes = (_dtype_of(network), _dtype_of(teacher))
        # A quantized model stays as it is.
        if dtypes[0] != dtypes[1] and all(dtype.is_floating_point for dtype in dtypes):
            teacher.to(dtypes[0])

        original_step = pl_module.training_step

        @functools.wraps(original_step)  # Lightning reads its signature
        def training_step(*args: Any, **kwargs: Any) -> Any:
            if not trainer.training:  # validation_step may call training_step for its loss
                return original_step(*args, **kwargs)

            comparison = _Comparison(network, teacher, self.temperature)
            with patched(network, "forward", comparison.watched(network.forward)):
                output = original_step(*args, **kwargs)
            if output is None:  # the module skips this batch
                return None

            divergence = comparison.mean(pl_module)
            pl_module.log("distillation_loss", divergence.detach(), prog_bar=True)
            loss = output["loss"] if isinstance(output, Mapping) else output
            loss = (1 - self.weight) * loss + self.weight * divergence
            return {**output, "loss": loss} if isinstance(output, Mapping) else loss

        self._patches.enter_context(patched(pl_module, "training_step", training_step))

    def on_train_end(self, *_: Any) -> None:
        """Restore `training_step`, and free the dense model."""
        self._patches.close()
        self._teacher = None

    on_exception = on_train_end  # type: ignore[assignment]  # of any arguments


@dataclass
class _Comparison:
    """Compares the predictions of all calls of a network in one training step with those of the dense model."""

    network: nn.Module
    teacher: nn.Module
    temperature: float
    total: Tensor | float = 0.0  # a number until the first call
    count: int = 0  # of predictions

    def watched(self, forward: Forward) -> Forward:
        """Return the forward of the network with a comparison of its output.

        Hooks would not do: the adapters of peft call the forward of the network past its hooks.
        """

        @functools.wraps(forward)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)

            inputs, options = clone_arguments((args, kwargs))  # the network may change its own
            if options.get("labels") is not None and causal_config(self.teacher):
                options["labels"] = None  # the dense model's own loss would take memory and time
            with torch.no_grad():
                output = self.teacher(*inputs, **options)
            dense = _predictions(as_encoded(self.network, output), "The dense model")
            are_vectors = has_vectors(output)

            arguments = _by_name(forward, args, kwargs)
            output = forward(*args, **kwargs)
            predicted = _predictions(as_encoded(self.network, output), "The network")
            self._add(predicted, dense, are_vectors, arguments)
            return output

        return watched

    def mean(self, pl_module: LightningModule) -> Tensor:
        """Return the divergence times the squared temperature, averaged over all predictions of the step."""
        if not isinstance(self.total, Tensor):
            name = type(pl_module).__name__
            children = ", ".join(child for child, _ in pl_module.named_children())
            raise MisconfigurationException(
                f"network must be the part of {name} whose predictions are compared, but training_step never called "
                f"{type(self.network).__name__} with gradients. Give network=NAME of what it calls; there are "
                f"{children}."
            )
        # Such a power keeps the gradients as large at any temperature (Hinton et al. 2015, section 2).
        return self.total * (self.temperature**2 / max(1, self.count))  # a batch may be all padding

    def _add(self, predicted: Tensor, dense: Tensor, are_vectors: bool, arguments: Kwargs) -> None:
        if not predicted.requires_grad:
            raise UserError(
                "The network must predict with gradients to be distilled, but its predictions have none, as after "
                "detach() or in a reentrant torch.utils.checkpoint. Use use_reentrant=False."
            )

        mask = fitting_mask(token_masks(self.network, arguments), "", predicted)
        predicted = predicted.flatten(0, -2)
        counted = None if mask is None else mask.keep.flatten().to(predicted.device)
        self.count += len(predicted) if counted is None else int(counted.sum())
        dense = dense.flatten(0, -2)
        if are_vectors:
            # Divided by the temperature, as logits are; `mean` multiplies by its square.
            errors = (widened(predicted - dense) / self.temperature).square().mean(dim=-1)
            self.total += errors.sum() if counted is None else errors[counted].sum()
        else:
            self.total += summed_divergence(predicted, dense, counted, self.temperature)


def _by_name(forward: Forward, args: tuple[Any, ...], kwargs: Kwargs) -> Kwargs:
    """Return the arguments of a call by name, with positional mappings unpacked."""
    named = dict(kwargs)
    for name, value in zip(inspect.signature(forward).parameters, args, strict=False):
        if isinstance(value, Mapping):
            named |= value
        else:
            named[name] = value
    return named


def _predictions(output: object, whose: str) -> Tensor:
    """Return the logits or the vectors of an output, with the classes or the entries in the last dimension."""
    predictions = find_predictions(output)
    if predictions is None:
        shown = type(output).__name__
    # A bare tensor of four dimensions may also be an image.
    elif predictions.ndim > 3 and not has_classes(output):
        shown = f"a tensor of shape {tuple(predictions.shape)}"
    else:
        return predictions

    raise UserError(
        f"{whose} must return logits of shape (samples, classes) or (samples, tokens, classes), or an output with "
        f"such `logits` or a `sentence_embedding`, or (samples, classes, height, width), but it returns {shown}. Give "
        "network=NAME of a part that does."
    )


def _dtype_of(model: nn.Module) -> torch.dtype:
    """Return the dtype of the largest parameter: small ones, such as norms, may be in another."""
    return max(model.parameters(), key=Tensor.numel).dtype


def network_of(module: LightningModule, name: str | None) -> nn.Module:
    """Return the submodule with this name; by default the module's `pruning_target`, else the module itself."""
    return pruning_target(module) if name is None else module.get_submodule(name)


def dense_model(dense: Dense, pl_module: LightningModule, name: str | None) -> nn.Module:
    """Return the dense counterpart of the network with this name in a module, frozen and in eval mode."""
    if dense is None:
        model = copy.deepcopy(network_of(pl_module, name))
    elif isinstance(dense, LightningModule):
        model = network_of(dense, name)
    elif isinstance(dense, nn.Module):
        model = dense
    else:
        loader: Any = pl_module  # see docs/lightning_module.md
        model = loader.load_dense_model(dense)

    zeros = _zeros_of_pruning(model)
    parameters = set(model.parameters())
    if dense is not None and zeros:
        rank_zero_warn(
            f"dense should be the model before pruning, but {zeros}. If it was pruned, give another model."
        )
    if dense is None and (zeros or not parameters):
        reason = f"is already pruned: {zeros}" if zeros else "has no parameters in setup()"
        raise UserError(
            f"dense must be given, since the network {reason}. Give the model from before pruning, or its name."
        )
    for parameter_name, parameter in pl_module.named_parameters():
        if parameter in parameters:
            raise UserError(
                f"dense must be a model of its own, but {parameter_name} of {type(pl_module).__name__} belongs to it, "
                "too: it would be trained and pruned. Leave dense out, or give copy.deepcopy() of the dense model."
            )
    return model.requires_grad_(False).eval()


def _zeros_of_pruning(model: nn.Module) -> str:
    """Describe the zeros of the first layer that seems to be pruned; empty if there is none."""
    for layer in find_layers(model).layers:
        share = int((layer.weight == 0).sum()) / layer.size
        if _SHARE_OF_ZEROS <= share < 1:  # some layers are initialized to zero
            return f"{share:.0%} of the weights of {layer.name} are zero"
    return ""
