"""Measure by backward passes how much the predictions of the dense model depend on each layer."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from wanda_lightning.calibration.cloning import clone_arguments, tensors_within
from wanda_lightning.calibration.interception import OnProduct, Product, intercept
from wanda_lightning.calibration.pruning_mode import patched
from wanda_lightning.calibration.samples import Sample, Samples, fit_together
from wanda_lightning.calibration.surroundings import Replay, modules_around, refuse_transforms
from wanda_lightning.common.errors import UserError
from wanda_lightning.core.allocation import GradientLimit
from wanda_lightning.core.statistics import GradientStatistics
from wanda_lightning.models import Layer, find_predictions, fitting_mask
from wanda_lightning.parallel import SINGLE_PROCESS, Processes

_SAMPLES_AT_ONCE = 32  # with one prediction each


def gradient_statistics(
    model: nn.Module,
    layers: Sequence[Layer],
    blocks: Sequence[nn.Module],
    samples: Samples,
    tick: Callable[[int | None], None] = lambda _: None,
    processes: Processes = SINGLE_PROCESS,
    limit: GradientLimit = GradientLimit(),
    columns: Mapping[str, int] = MappingProxyType({}),
) -> dict[str, GradientStatistics]:
    """Sum squared inputs and gradients of each layer over the tokens.

    The gradient is that of `log p(y)` with respect to the layer's outputs. The label y is drawn from the model's own
    predictions p, so the sums estimate the Fisher information. The classes are in the last dimension of the logits, or
    in dimension 1 if they have four or more, as in segmentation. The label of a sample depends on its index in the
    calibration data and on its predictions, but not on its batch or process. Each sample has its own backward pass, in
    which blocks are recomputed. Up to 32 samples with one prediction each, such as images, share a pass.

    After each batch, `tick` receives an estimate of the number of batches left, assuming that they are as large as this
    one, or None if there is no limit. `limit` is the number of samples over all processes, batch i of all processes
    before batch i + 1 of any. `columns` has the number of columns of each hidden unit, for the layers whose units are
    scored. The result holds the layers that a batch reached.

    Raises:
        ValueError: If a pass returns no logits, predictions or gradients hold NaN or infinity, or all gradients are 0.
    """
    sums = {layer.name: _zeros(layer, columns.get(layer.name)) for layer in layers}
    reached = torch.zeros(len(layers), dtype=torch.int64)
    on_product = _on_product(
        {layer.name: index for index, layer in enumerate(layers)}, sums, reached
    )
    intercepted = intercept(layers, on_product)
    with without_gradients(model), intercepted, recomputing(model, blocks), torch.enable_grad():
        _pass_backward(samples, tick, processes, limit)
    processes.all_reduce_sum(
        [reached, *(each for total in sums.values() for each in total if each is not None)]
    )
    _refuse_unusable(sums, bool(reached.any()))
    return {
        layer.name: sums[layer.name]
        for layer, times in zip(layers, reached.tolist(), strict=True)
        if times
    }


def check_predictions(layers: Sequence[Layer], sample: Sample) -> None:
    """Raise the errors of `gradient_statistics` that one forward pass of a sample shows."""
    with (
        torch.enable_grad(),
        intercept(layers, lambda _, multiply: multiply().detach().requires_grad_().clone()),
    ):
        _objective(sample, 0, 0)


def _refuse_unusable(sums: Mapping[str, GradientStatistics], reached: bool) -> None:
    """Refuse gradients that are not finite, or all 0 although a layer was reached."""
    for name, total in sums.items():
        if not all(each.isfinite().all() for each in total if each is not None):
            raise UserError(
                f"calibration batches must give finite gradients, but those at {name} hold NaN or infinity. Load the "
                "model in a wider dtype (float32 or bfloat16), or choose allocation='uniform' and "
                "pattern='unstructured_layer', which read no gradients."
            )
    if reached and not any(total.inputs.any() for total in sums.values()):
        raise UserError(
            "calibration batches must give predictions that depend on the layers, but all gradients are 0, for example "
            "because the output head is zero or all predictions have probability 1. Use a trained model, or choose "
            "allocation='uniform' and pattern='unstructured_layer', which read no gradients."
        )


def _zeros(layer: Layer, columns: int | None) -> GradientStatistics:
    d_out, d_in = layer.shape
    zeros = torch.zeros(d_in + d_out, dtype=torch.float32, device=layer.weight.device)
    units = None if columns is None else zeros.new_zeros(d_in // columns)
    return GradientStatistics(zeros[:d_in], zeros[d_in:], units)


def _pass_backward(
    samples: Samples, tick: Callable[[int | None], None], processes: Processes, limit: GradientLimit
) -> None:
    """Run backward passes for one batch of each process, then for the next, until enough samples are done.

    The index of a sample is its position in this order; in a single process this is the order of the batches.
    """
    batches = iter(samples)
    done = 0
    predictions = 0
    last = limit.samples
    while last is None or done < last:
        with processes.fail_together():
            batch = next(batches, None)
            own = samples.split(batch) if batch else []
        sizes = processes.all_gather([batch is not None, sum(sample.size for sample in own)])
        if not any(has_batch for has_batch, _ in sizes):
            return
        index = done + sum(size for _, size in sizes[: processes.rank])
        with processes.fail_together():
            if not predictions and any(size for _, size in sizes):
                first = next(rank for rank, (_, size) in enumerate(sizes) if size)
                if processes.rank == first:
                    sample, *own = own
                    predictions = _backward(sample, index, last)
                    index += sample.size
                predictions = processes.broadcast(predictions, first)
                last = None if last is None else max(last, -(-limit.predictions // predictions))
            own = own if last is None else own[: max(0, last - index)]
            for sample in _joined(samples, own) if predictions == 1 else own:
                _backward(sample, index, last)
                index += sample.size
            samples_in_round = sum(size for _, size in sizes)
            done += samples_in_round
            tick(None if last is None else -(-max(0, last - done) // max(1, samples_in_round)))


def _backward(sample: Sample, first: int, last: int | None) -> int:
    """Run the backward pass of a sample, and return how many predictions it has.

    `first` is its index, or that of the first of several joined samples, and `last` the number of samples in all; None
    if all of them pass backward.
    """
    objective, predictions = _objective(
        sample, first, sample.size if last is None else last - first
    )
    objective.backward()
    return predictions


def _joined(samples: Samples, parts: Sequence[Sample]) -> Iterator[Sample]:
    """Join samples of equal shapes, so that one backward pass has some of them."""
    for start in range(0, len(parts), _SAMPLES_AT_ONCE):
        some = parts[start : start + _SAMPLES_AT_ONCE]
        yield from [samples.join(some)] if fit_together(some) else some


def _objective(sample: Sample, first: int, count: int) -> tuple[Tensor, int]:
    """Return a number whose gradient with respect to the logits is that of `-log p(y)`: `p - onehot(y)`.

    The gradient is computed by hand, because cross entropy would hold three more tensors of this size. The logits are
    freed when this returns, and the gradient after the backward pass of the output head.

    The seed of a label is the index of its sample in the calibration data; `first` is that of the first sample. Only
    the first `count` samples have a gradient that is not 0. Also return how many predictions each sample has, including
    those of padding.
    """
    output = sample.predict()
    keep = None
    logits = find_predictions(output)
    if logits is None or not logits.requires_grad or logits.shape[-1] < 2:
        shape = "" if logits is None else f" of shape {tuple(logits.shape)}"
        raise UserError(
            f"forward must return predictions, since gradients are read, but a batch gave {type(output).__name__}"
            f"{shape} without logits of two or more classes that depend on the pruned layers. Let forward= (or "
            "calibration_step) return the logits, or choose allocation='uniform' and pattern='unstructured_layer', "
            "which read no gradients."
        )
    del output
    # The mask of the whole model, not of its encoder.
    if mask := fitting_mask(sample.masks, "", logits):
        keep = mask.keep.to(logits.device)
        logits = logits.reshape(*keep.shape, -1)
    if not (logits if keep is None else logits[keep]).isfinite().all():
        raise UserError(
            "calibration batches must give finite predictions, but those of batch "
            f"{sample.batch_index} (counted from 0) hold NaN or infinity. Check that batch, or load the model in a "
            "wider dtype (float32 or bfloat16 rather than float16)."
        )
    gradient = torch.zeros_like(logits)
    # More than 1 if the first dimension is not that of samples.
    length = max(1, len(logits) // sample.size)
    for index in range(min(sample.size, count)):
        own = slice(index * length, (index + 1) * length)
        rows = logits[own].detach() if keep is None else logits[own].detach()[keep[own]]
        slopes = rows.reshape(-1, rows.shape[-1]).float().softmax(dim=-1)
        generator = torch.Generator(rows.device).manual_seed(first + index)
        if len(slopes):
            labels = torch.multinomial(slopes, 1, generator=generator)
            slopes.scatter_add_(1, labels, slopes.new_full(labels.shape, -1))
        values = slopes.to(gradient.dtype)
        if keep is None:
            gradient[own] = values.view(gradient[own].shape)
        else:
            gradient[own][keep[own]] = values
    objective: Tensor = _WithGradient.apply(logits, gradient)  # type: ignore[no-untyped-call]
    return objective, max(1, logits[..., 0].numel() // sample.size)


class _WithGradient(torch.autograd.Function):
    """Zero with a given gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return logits.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Any) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0], None


def _on_product(
    indices: Mapping[str, int], sums: Mapping[str, GradientStatistics], reached: Tensor
) -> OnProduct:
    def on_product(products: list[Product], multiply: Callable[[], Tensor]) -> Tensor:
        if not torch.is_grad_enabled():  # no gradient reaches this product
            return multiply()
        totals = [sums[product.layer.name] for product in products]
        inputs = [product.layer.tokens(product.tokens.detach()).float() for product in products]
        squares = [each.square() for each in inputs]
        # A copy, because the model may write into its activations before the backward pass
        signed = [
            x.clone() if total.units is not None else None
            for x, total in zip(inputs, totals, strict=True)
        ]
        del inputs
        output = multiply()
        # The graph starts here; a result is no leaf, because the model may write into it.
        if not output.requires_grad:
            output = output.detach().requires_grad_().clone()

        def add(gradient: Tensor) -> None:
            for product, each, tokens, total in zip(products, squares, signed, totals, strict=True):
                layer = product.layer
                outputs = layer.outputs(product.own_output(gradient)).flatten(0, -2).float()
                rows = slice(product.row, product.row + outputs.shape[1])
                squared = outputs.square()
                # Divide by all rows of the layer: this product may use only some of them.
                total.inputs.add_(torch.mv(each.t(), squared.sum(dim=1) / len(total.rows)))
                total.rows[rows].add_(squared.sum(dim=0))
                # The first-order effects on the loss.
                if tokens is not None and total.units is not None:
                    effects = torch.mm(outputs, layer.read()[rows].float()).mul_(tokens)
                    total.units.add_(
                        effects.unflatten(1, (-1, len(total.units))).sum(dim=1).square_().sum(dim=0)
                    )
                reached[indices[layer.name]] += layer.expert is None or bool(each.any())

        output.register_hook(add)
        return output

    return on_product


@contextmanager
def without_gradients(model: nn.Module) -> Iterator[None]:
    """Turn off `requires_grad` of all parameters inside this `with` block."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def recomputing(model: nn.Module, blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Recompute the blocks in every backward pass inside this `with` block; without gradients nothing changes.

    Only the inputs of each block are stored until then (Chen et al. 2016, arXiv 1604.06174). A block may take and
    return any nested structure of tensors. The second run must compute the same as the first, so it has the modes,
    context variables and attributes of the modules around the block that the first run had. A block keeps its
    activations if it writes into its arguments, or receives an object with tensors, which another block may write, such
    as a key-value cache. It also keeps them if it sets a context variable, or an attribute of a module around it, or if
    one of these holds a tensor that requires gradients.
    """
    around = modules_around(model, blocks)
    outside = contextvars.copy_context()
    with ExitStack() as restored:
        for block in blocks:
            recomputed = _Recomputed(
                type(block).__name__, block.forward, lambda: Replay(around, outside)
            )
            restored.enter_context(patched(block, "forward", recomputed))
        yield


class _Recomputed:
    """The forward of a block that runs again in the backward pass, with gradients enabled."""

    def __init__(
        self, name: str, forward: Callable[..., Any], replay: Callable[[], Replay]
    ) -> None:
        self._name = name  # of the class, for a message
        self._forward = forward
        self._replay = replay
        self._writes = False  # into its arguments, or into what is around it

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block, without keeping its activations if it can be recomputed."""
        if self._writes or not torch.is_grad_enabled():
            return self._forward(*args, **kwargs)
        refuse_transforms(self._name)
        inputs, structure = tree_flatten((args, kwargs))
        # The graph holds `run`. If `run` held a tensor of the graph, neither would ever be freed.
        tensors = [leaf for leaf in inputs if isinstance(leaf, Tensor)]
        inputs = [_ATensor if isinstance(leaf, Tensor) else leaf for leaf in inputs]
        replay = self._replay()
        if tensors_within(inputs) or any(tensor.requires_grad for tensor in replay.tensors()):
            return self._forward(*args, **kwargs)
        inputs = clone_arguments(inputs)  # another block may write into them before the second run
        outputs: list[Any] = []
        output_structure: Any = None

        def run(anchor: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            nonlocal outputs, output_structure
            clones = (tensor.clone() for tensor in tensors)
            own = tree_unflatten(_filled(clone_arguments(inputs), clones), structure)
            held = tensors_within(own)
            versions = [tensor._version for tensor in held]

            output, has_set = replay.run(lambda: self._forward(*own[0], **own[1]))
            leaves, output_structure = tree_flatten(output)
            del output
            self._writes = self._writes or has_set or _were_written(own, held, versions)
            found = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            outputs = [_ATensor if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            if torch.is_grad_enabled() and not any(tensor.requires_grad for tensor in found):
                found = [
                    tensor + anchor.to(tensor.dtype) if tensor.is_floating_point() else tensor
                    for tensor in found
                ]
            return tuple(found)

        # `checkpoint` needs an input that requires a gradient, and the inputs of the first block do not.
        anchor = torch.zeros((), requires_grad=True, device=tensors[0].device if tensors else None)
        results = checkpoint(run, anchor, *tensors, use_reentrant=True)
        if self._writes:
            return self._forward(*args, **kwargs)
        return tree_unflatten(_filled(outputs, iter(results)), output_structure)


class _ATensor:
    """Placeholder for a tensor."""


def _filled(leaves: Sequence[Any], tensors: Iterator[Tensor]) -> list[Any]:
    return [next(tensors) if leaf is _ATensor else leaf for leaf in leaves]


def _were_written(arguments: Any, held: Sequence[Tensor], versions: Sequence[int]) -> bool:
    """Return whether the arguments hold other tensors than before, or tensors with other values."""
    found = tensors_within(arguments)
    return (
        list(map(id, found)) != list(map(id, held))
        or [tensor._version for tensor in found] != versions
    )
