"""Measure by backward passes how much the predictions of the dense model depend on the output of each layer."""

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
    samples: int | None = None,
) -> dict[str, PerInput]:
    """For each layer, sum `x² * mean(g²)` over the tokens, one value for each input.

    x is the layer's input and g the gradient of `log p(y)` with respect to its output. The label y is drawn from the
    model's own predictions p, so no labels are needed. Multiplied by `W²`, the result is the diagonal of the Fisher
    information, averaged over the rows. The label of a sample depends on its index in the calibration data and on its
    predictions, but not on its batch or process. Needs as much memory as a training step on one batch, without the
    gradients of the weights.

    Args:
        model: The model in evaluation mode; its weights get no gradients.
        layers: The layers to measure.
        forwards: Forward passes of this process; each returns the logits, or an object or mapping with `logits`.
        masks: The padding of each batch, which does not count; filled while `forwards` is iterated.
        tick: Called after each batch.
        processes: Processes whose batches are summed. Batch i of all processes precedes batch i + 1 of any.
        samples: Number of samples, over all processes, that are passed backward; None for all.

    Returns:
        The sums, by name of each layer that a batch reached.

    Raises:
        ValueError: If a pass returns no logits, predictions or gradients hold NaN or infinity, or all gradients are 0.
    """
    sums: dict[str, PerInput] = {
        layer.name: torch.zeros(layer.shape[1], dtype=torch.float32, device=layer.weight.device) for layer in layers
    }
    reached = torch.zeros(len(layers), dtype=torch.int64)
    on_product = _on_product({layer.name: index for index, layer in enumerate(layers)}, sums, reached)
    with without_gradients(model), intercept(layers, on_product), torch.enable_grad():
        _pass_backward(forwards, masks, tick, processes, samples)
    processes.all_reduce_sum([reached, *sums.values()])
    _refuse_nonfinite(sums)
    if reached.any() and not any(total.any() for total in sums.values()):
        raise ValueError(
            "allocation=Fisher() needs predictions that depend on the layers, but all gradients are 0, as with an "
            "output head of zeros or with predictions of probability 1. Give a trained model, or use another "
            "allocation such as 'owl'."
        )
    return {layer.name: sums[layer.name] for layer, times in zip(layers, reached.tolist(), strict=True) if times}


def _pass_backward(
    forwards: Iterable[Callable[[], object]],
    masks: Sequence[tuple[TokenMask, ...] | None],
    tick: Callable[[], None],
    processes: Processes,
    limit: int | None,
) -> None:
    """Pass one batch of each process backward, then the next, until `limit` samples are done or no batch is left.

    The index of a sample is its position in this order; in a single process this is the order of the batches.
    """
    iterator, batch, done = iter(forwards), 0, 0
    while limit is None or done < limit:
        with processes.fail_together():
            forward = next(iterator, None)
            predictions = None if forward is None else _Predictions(forward(), masks[batch], batch)
        sizes = processes.all_gather([predictions is not None, 0 if predictions is None else predictions.size])
        if not any(has_batch for has_batch, _ in sizes):
            return
        with processes.fail_together():
            if predictions is not None:
                first = done + sum(size for _, size in sizes[: processes.rank])
                predictions.backward(first, predictions.size if limit is None else limit - first)
                tick()
        del predictions  # frees the graph
        done += sum(size for _, size in sizes)
        batch += 1


class _Predictions:
    """The logits of one batch, samples first.

    Attributes:
        size: Number of samples that count.
    """

    def __init__(self, output: object, padding: tuple[TokenMask, ...] | None, batch: int) -> None:
        logits, keep = _logits(output), None
        if mask := fitting_mask(padding or (), "", logits):  # the mask of the whole model, not of its encoder
            keep = mask.keep.to(logits.device)
            logits = logits.reshape(*keep.shape, -1)
        if not (logits if keep is None else logits[keep]).isfinite().all():
            raise ValueError(
                f"calibration batches must give finite predictions, but those of batch {batch} (counted from 0) hold "
                "NaN or infinity. Check that batch, or load the model in a wider dtype (float32 or bfloat16 rather "
                "than float16)."
            )
        self._logits, self._keep = logits, keep
        self.size = 0 if padding is None else len(logits)

    def backward(self, first: int, count: int) -> None:
        """Pass the gradient of `-log p(y)` with respect to the logits backward: `p - onehot(y)`.

        The gradient is computed by hand, because cross entropy would hold three more tensors of this size.

        Args:
            first: Index of the first sample in the calibration data; the index of a sample is the seed of its label.
            count: Number of samples, from the first on, that are passed backward; the others have a gradient of 0.
        """
        gradient = torch.zeros_like(self._logits)
        for index in range(min(self.size, count)):
            rows = self._logits[index].detach() if self._keep is None else self._logits[index][self._keep[index]]
            slopes = rows.detach().reshape(-1, rows.shape[-1]).float().softmax(dim=-1)
            generator = torch.Generator(rows.device).manual_seed(first + index)
            if len(slopes):
                labels = torch.multinomial(slopes, 1, generator=generator)
                slopes.scatter_add_(1, labels, slopes.new_full(labels.shape, -1))
            values = slopes.to(gradient.dtype)
            if self._keep is None:
                gradient[index] = values.view(gradient[index].shape)
            else:
                gradient[index, self._keep[index]] = values
        if count > 0 and self.size:
            self._logits.backward(gradient)


def _on_product(indices: Mapping[str, int], sums: Mapping[str, PerInput], reached: Tensor) -> OnProduct:
    def on_product(products: list[Product], multiply: Callable[[], Tensor]) -> Tensor:
        if not torch.is_grad_enabled():  # no gradient reaches this product
            return multiply()
        squares = [product.layer.tokens(product.tokens.detach()).float().square() for product in products]
        output = _with_graph(multiply())

        def add(gradient: Tensor) -> None:
            for product, each in zip(products, squares, strict=True):
                _add(product.layer, each, product.layer.outputs(product.part(gradient)), sums[product.layer.name])
                reached[indices[product.layer.name]] += product.layer.expert is None or bool(each.any())

        output.register_hook(add)
        return output

    return on_product


def _with_graph(output: Tensor) -> Tensor:
    """Start the graph at the first layer, with a result that is no leaf, because the model may write into it."""
    return output if output.requires_grad else output.detach().requires_grad_().clone()


def _add(layer: Layer, squares: Tensor, gradient: Tensor, total: PerInput) -> None:
    # Not the mean over the rows of this product: a model may multiply the rows of an expert in several pieces.
    weights = gradient.flatten(0, -2).float().square().sum(dim=-1) / layer.shape[0]
    total.add_(torch.mv(squares.t(), weights))


def _logits(output: object) -> Tensor:
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if isinstance(found, tuple | list) and found:
        found = found[0]
    if not isinstance(found, Tensor) or found.ndim < 2 or not found.requires_grad:
        raise ValueError(
            f"allocation=Fisher() needs the model's predictions, but a batch gave {type(output).__name__} without "
            "logits that depend on the pruned layers. Let forward= (or calibration_step) return the logits, or use "
            "another allocation such as 'owl'."
        )
    return found


def _refuse_nonfinite(sums: Mapping[str, PerInput]) -> None:
    for name, total in sums.items():
        if not total.isfinite().all():
            raise ValueError(
                f"allocation=Fisher() needs finite gradients, but those at {name} hold NaN or infinity. Load the model "
                "in a wider dtype (float32 or bfloat16), or use another allocation."
            )


@contextmanager
def without_gradients(model: nn.Module) -> Iterator[None]:
    """Turn off `requires_grad` of all parameters in this block."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
