"""LoRA adapters that make up for the errors of pruning, in closed form."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from typing import Any, TypeAlias

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from wanda_lightning.calibration.mode import pruning_mode
from wanda_lightning.calibration.observer import Observer
from wanda_lightning.calibration.samples import Samples
from wanda_lightning.calibration.unit_stops import stop_at_units
from wanda_lightning.common.checks import check_at_least, check_batches, check_callable
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.progress import ProgressBar
from wanda_lightning.common.widest import widest
from wanda_lightning.core.gram import cholesky
from wanda_lightning.core.types import Weight
from wanda_lightning.models import Layer, find_layers
from wanda_lightning.models.refuse_model import refuse_no_module
from wanda_lightning.parallel import SINGLE_PROCESS

_ADAPTED = (nn.Linear, Conv1D)
_DAMPENING = 1e-4  # of the Gram matrix, as a fraction of its mean diagonal, where the difference of biases is regressed
_Error: TypeAlias = tuple[Weight, Tensor | None]


def repair(
    model: nn.Module,
    dense: nn.Module,
    batches: Iterable[Any],
    rank: int = 32,
    *,
    forward: Callable[[Any], object] | None = None,
    progress: bool = True,
) -> PeftModel:
    """Return the pruned model with LoRA adapters that replace a part of what pruning has removed, without training.

    For each pruned linear layer outside of experts, B A of the given rank minimizes the sum of
    `||(W_dense - W - B A) x + b_dense - b||^2` over the tokens x of the calibration batches, which run through the
    pruned model, whose biases b may have been fitted. It takes one forward pass, and for each layer the eigenvectors
    of a matrix (d_out, d_out). The adapters are plain LoRA: PEFT loads them without this package, and they can be
    trained. Do not merge them, because that fills the zeros.

    Args:
        model: The pruned model. It gets the adapters and must not be used on its own afterward, as with PEFT.
        dense: The model before pruning, with its units in the same order, so prune with `permutation="none"`.
        batches: Calibration batches, as for `prune`.
        rank: Rank of each adapter. It adds `rank * (d_in + d_out)` parameters to a layer.
        forward: Runs one batch through the model, as for `prune`.
        progress: Show the progress.

    Raises:
        ValueError: The models differ in their layers or in nothing, hold weights that are not finite, or rank is too
            large. The model is unchanged then.

    Source: EoRA (Liu et al. 2024, arXiv 2410.21271), Algorithm 1. The minimum is computed without its inverse: with the
    eigenvectors U of E G E^T for the largest eigenvalues, where E = W_dense - W and G is the Gram matrix of the inputs,
    B = U and A = U^T E. Where biases differ, E includes the regression of that difference on x, which is
    (b_dense - b) s^T G^-1 with the sum s of all x.
    """
    refuse_no_module(model, "repair(model, dense, batches)")
    refuse_no_module(dense, "repair(model, dense, batches)", "dense")
    check_batches(batches=batches)
    check_at_least(1, rank=rank)
    check_callable(forward=forward)
    units = find_layers(model, "block").units
    errors = _errors(model, dense, [layer for unit in units for layer in unit.layers], rank)
    samples = Samples(model, batches, forward, None, SINGLE_PROCESS, "repair()")
    samples.read_all(progress)
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    stops = stop_at_units(model, units, samples, SINGLE_PROCESS, set())
    with pruning_mode(model), closing(stops), ProgressBar("Repairing", len(units), progress) as bar:
        for stop in stops:
            bar.show(stop.unit.name)
            inputs = stop.observe(Observer(frozenset({"gram", "sum"})), lambda calls: calls)
            for layer in stop.unit.layers:
                if layer.name in errors and layer.name in inputs and inputs[layer.name].count:
                    error, shift = errors.pop(layer.name)()
                    factors[layer.name] = _factors(layer, error, shift, inputs[layer.name].sums, rank)
            bar.advance()
    if not factors:
        raise UserError(
            "batches must reach at least one pruned linear layer, but no token except padding does. Give other batches."
        )
    transposed = any(isinstance(model.get_submodule(name), Conv1D) for name in factors)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(factors), fan_in_fan_out=transposed)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, (left, right) in factors.items():
            adapter = adapted.base_model.model.get_submodule(name)
            adapter.lora_B["default"].weight.copy_(left)
            adapter.lora_A["default"].weight.copy_(right)
    return adapted


def _errors(model: nn.Module, dense: nn.Module, layers: Iterable[Layer], rank: int) -> dict[str, Callable[[], _Error]]:
    """Return what computes W_dense - W and b_dense - b for each linear layer that pruning has changed, by name."""
    found: dict[str, Callable[[], _Error]] = {}
    originals = dict(dense.named_modules())
    for layer in layers:
        if not isinstance(layer.module, _ADAPTED) or layer.expert is not None:
            continue
        original = getattr(originals.get(layer.name), "weight", None)
        if not isinstance(original, Tensor) or original.shape != layer.weight.shape:
            has = f"one of shape {tuple(original.shape)}" if isinstance(original, Tensor) else "none"
            raise UserError(
                f"dense must be the model before pruning, but {layer.name} has a weight of shape "
                f"{tuple(layer.weight.shape)} in the pruned model and {has} in the dense one. Load the dense model."
            )
        for whose, weight in (("model", layer.weight), ("dense", original)):
            if weight.is_meta or not weight.isfinite().all():
                has = "is on the meta device" if weight.is_meta else "has weights that are NaN or infinite"
                raise UserError(f"{whose} must have finite weights, but {layer.name} {has}. Check how it was loaded.")
        if rank > min(layer.shape):
            raise UserError(
                f"rank must be at most {min(layer.shape)}, the smaller side of {layer.name}, but it is {rank}."
            )

        biases = getattr(originals[layer.name], "bias", None), layer.module.bias

        def error(layer: Layer = layer, original: Tensor = original, biases: Any = biases) -> _Error:
            shift = None if None in biases else biases[0].detach().to(biases[1]) - biases[1].detach()
            return layer.kind.read(original.detach().to(layer.weight)) - layer.read(), shift

        if not torch.equal(original.detach().to(layer.weight), layer.weight):
            found[layer.name] = error
    if not found:
        raise UserError(
            "model must be pruned, but all its linear layers have the same weights as in dense. Prune it first."
        )
    return found


def _factors(
    layer: Layer, error: Weight, shift: Tensor | None, sums: Mapping[str, Tensor], rank: int
) -> tuple[Tensor, Tensor]:
    """Return B (d_out, rank) and A (rank, d_in) that are nearest to the error in the outputs."""
    gram = sums["gram"]
    error, weight = error.to(gram.dtype), layer.read().to(gram.dtype)
    if shift is not None and shift.any():
        lower, _ = cholesky(gram, _DAMPENING)
        error = error + torch.outer(shift.to(gram.dtype), torch.cholesky_solve(sums["sum"][:, None], lower)[:, 0])
    squares = error @ gram @ error.T
    whole = weight + error
    if squares.trace() > (whole @ gram).mul_(whole).sum():
        raise UserError(
            f"dense must be the model before pruning, but the weights of {layer.name} differ by more than their size. "
            "Load the model that was pruned, and prune with permutation='none', since other orders of units differ."
        )
    left = torch.linalg.eigh(widest(squares)).eigenvectors[:, -rank:].to(error)
    return left, left.T @ error
