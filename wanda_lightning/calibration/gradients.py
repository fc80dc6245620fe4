"""How much the model's predictions depend on what each layer gives: backward passes through the dense model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from wanda_lightning.calibration.interception import OnProduct, Product, intercept
from wanda_lightning.core.types import PerInput
from wanda_lightning.models import Layer, TokenMask, fitting_mask
from wanda_lightning.parallel import Processes


def fisher(
    model: nn.Module,
    layers: Sequence[Layer],
    forwards: Iterable[Callable[[], object]],
    masks: Sequence[tuple[TokenMask, ...] | None],
    tick: Callable[[], None],
    processes: Processes,
) -> dict[str, PerInput]:
    """For each layer that a batch reaches, the sum over tokens of `x² * mean(g²)`, one number for each input.

    x is what enters the layer, g the gradient of `log p(y)` by what it gives out, with y drawn from the predictions
    p of the model itself, so that no labels are needed; times `W²` the diagonal of the Fisher information, its rows
    averaged. Takes the memory of a training step of one batch, without gradients of weights.

    Args:
        model: The model, in evaluation mode; its weights get no gradients.
        layers: Those to look at.
        forwards: Passes through the model, each of which returns logits or something with `logits`.
        masks: The padding of each batch, which does not count; grows with `forwards`.
        tick: Called after each.
        processes: Those whose batches are added up.

    Raises:
        ValueError: If a pass returns no logits, predictions or gradients hold NaN or infinity, or all gradients are 0.
    """
    sums: dict[str, PerInput] = {
        layer.name: torch.zeros(layer.shape[1], dtype=torch.float32, device=layer.weight.device) for layer in layers
    }
    reached = torch.zeros(len(layers), dtype=torch.int64)
    on_product = _on_product({layer.name: index for index, layer in enumerate(layers)}, sums, reached)
    with processes.fail_together(), without_gradients(model), intercept(layers, on_product), torch.enable_grad():
        for batch, forward in enumerate(forwards):
            _backward(forward(), masks[batch], batch, seed=batch * processes.world_size + processes.rank)
            tick()
    processes.all_reduce_sum([reached, *sums.values()])
    for layer in layers:
        if not sums[layer.name].isfinite().all():
            raise ValueError(
                f"the gradients at {layer.name} hold NaN or infinity, so they cannot say how much it matters: load the "
                "model in a wider dtype (float32 or bfloat16), or use another allocation"
            )
    if reached.any() and not any(total.any() for total in sums.values()):
        raise ValueError(
            "the predictions depend on no layer: all gradients are 0, as behind a head of zeros or where one class is "
            "certain. Give a model that is trained, or use another allocation"
        )
    return {layer.name: sums[layer.name] for layer, times in zip(layers, reached.tolist(), strict=True) if times}


def _backward(output: object, padding: tuple[TokenMask, ...] | None, batch: int, seed: int) -> None:
    """Pass one batch backward; that it is over when this returns frees its graph."""
    logits = _logits(output)
    if padding is None:
        return
    rows = logits.flatten(0, -2)
    if mask := fitting_mask(padding, "", logits):  # that of the whole model, not of its encoder
        rows = rows[mask.keep.flatten().to(rows.device)]
    if not rows.isfinite().all():
        raise ValueError(
            f"the predictions for calibration batch {batch} (counted from 0) hold NaN or infinity: check that batch, "
            "or load the model in a wider dtype (float32 or bfloat16 rather than float16)"
        )
    rows.backward(_by_logits(rows.detach(), seed))


def _on_product(indices: Mapping[str, int], sums: Mapping[str, PerInput], reached: Tensor) -> OnProduct:
    def on_product(products: list[Product], multiply: Callable[[], Tensor]) -> Tensor:
        if not torch.is_grad_enabled():  # nothing comes back here
            return multiply()
        squares = [product.layer.tokens(product.tokens.detach()).float().square() for product in products]
        output = _in_a_graph(multiply())

        def add(gradient: Tensor) -> None:
            for product, each in zip(products, squares, strict=True):
                _add(product.layer, each, product.layer.outputs(product.part(gradient)), sums[product.layer.name])
                reached[indices[product.layer.name]] += product.layer.expert is None or bool(each.any())

        output.register_hook(add)
        return output

    return on_product


def _in_a_graph(output: Tensor) -> Tensor:
    if output.requires_grad:
        return output
    # The first layer: from here on there is a graph. Not a leaf, which no later step may write into.
    return output.detach().requires_grad_().clone()


def _add(layer: Layer, squares: Tensor, gradient: Tensor, total: PerInput) -> None:
    # Not the mean: an expert's rows may be multiplied in several pieces.
    weights = gradient.flatten(0, -2).float().square().sum(dim=-1) / layer.shape[0]
    total.add_(torch.mv(squares.t(), weights))


def _logits(output: object) -> Tensor:
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if isinstance(found, tuple | list) and found:
        found = found[0]
    if not isinstance(found, Tensor) or found.ndim < 2 or not found.requires_grad:
        raise ValueError(
            f"Fisher() needs predictions to see what matters for them, but a batch gave {type(output).__name__} "
            "without logits that depend on the pruned layers: let forward= (or calibration_step) return the logits, "
            "or use another allocation such as 'owl'"
        )
    return found


def _by_logits(rows: Tensor, seed: int) -> Tensor:
    """The gradient of `-log p(y)` by the logits, `p - onehot(y)`, with each label y drawn from p.

    Written out, because cross entropy would hold three more tensors of this size.
    """
    gradient = rows.float().softmax(dim=-1)
    generator = torch.Generator(rows.device).manual_seed(seed)
    drawn = torch.multinomial(gradient, 1, generator=generator)
    return gradient.scatter_add_(1, drawn, gradient.new_full(drawn.shape, -1)).to(rows.dtype)


@contextmanager
def without_gradients(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient meanwhile."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
