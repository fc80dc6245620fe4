"""Measure by backward passes how much the predictions of the dense model depend on each layer."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module

from wanda_lightning.calibration.interception import Multiply, Product, intercept
from wanda_lightning.calibration.recomputing import recomputing
from wanda_lightning.calibration.samples import Sample, Samples, fit_together
from wanda_lightning.common.errors import UserError
from wanda_lightning.core.allocation import GradientLimit
from wanda_lightning.core.statistics import GradientStatistics
from wanda_lightning.models import Layer, find_predictions, fitting_mask, has_vectors

Tick = Callable[[int | None], None]


def gradient_statistics(
    model: Module,
    layers: Sequence[Layer],
    blocks: Sequence[Module],
    samples: Samples,
    tick: Tick,
    limit: GradientLimit,
    columns: Mapping[str, int],
) -> dict[str, GradientStatistics]:
    """Sum squared inputs and gradients of each layer over the tokens.

    The gradient is that of `log p(y)` with respect to the layer's outputs. The target y is drawn from the model's own
    predictions p, so the sums estimate the Fisher information. Logits predict a distribution of classes, which are in
    their last dimension, or in dimension 1 if they have four or more, as in segmentation. Vectors z, such as
    embeddings, predict a normal distribution N(z, I), whose Fisher information is that of the squared error: the
    gradient at z is a standard normal direction, and the sums estimate J^T J (Martens 2020, "New insights and
    perspectives on the natural gradient method"). `has_vectors` says which of the two an output is.

    The target of a sample depends on its index in the calibration data and on its predictions, but not on its batch or
    process. Each sample has its own backward pass, in which blocks are recomputed. Up to 32 samples with one prediction
    each, such as images, share a pass.

    After each batch, `tick` receives an estimate of the number of batches left, assuming that they are as large as this
    one, or None if there is no limit. `limit` is the number of samples over all processes, batch i of all processes
    before batch i + 1 of any. `columns` has the number of columns of each hidden unit, for the layers whose units are
    scored. The result holds the layers that a batch reached.

    Raises:
        ValueError: If a pass returns no predictions, if they or gradients hold NaN or infinity, or all gradients are 0.
    """
    sums = _Sums(layers, columns)
    passes = _BackwardPasses(samples, limit)
    with (
        without_gradients(model),
        intercept(layers, sums),
        recomputing(blocks),
        torch.enable_grad(),
    ):
        passes.run(tick)

    reached = torch.tensor([sums.reached[name] for name in sums.by_layer])
    tensors = [reached]
    for total in sums.by_layer.values():
        tensors += _tensors(total)
    samples.processes.all_reduce_sum(tensors)
    _refuse_unusable(sums.by_layer, bool(reached.any()))
    pairs = zip(sums.by_layer.items(), reached.tolist(), strict=True)
    return dict(item for item, times in pairs if times)


def check_predictions(layers: Sequence[Layer], sample: Sample) -> None:
    """Raise the errors of `gradient_statistics` that one forward pass of a sample shows."""

    def without_sums(products: list[Product], multiply: Multiply) -> Tensor:
        return multiply().detach().requires_grad_().clone()

    with torch.enable_grad(), intercept(layers, without_sums):
        _objective(sample, 0, 0)


def _refuse_unusable(sums: Mapping[str, GradientStatistics], reached: bool) -> None:
    """Refuse gradients that are not finite, or all 0 although a layer was reached."""
    for name, total in sums.items():
        if not all(tensor.isfinite().all() for tensor in _tensors(total)):
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


def _tensors(total: GradientStatistics) -> list[Tensor]:
    return [tensor for tensor in total if tensor is not None]


# ---- the order of the samples

_SAMPLES_AT_ONCE = 32  # with one prediction each


@dataclass(frozen=True)
class _Part:
    """Samples that share a backward pass."""

    sample: Sample
    index: int  # of its first sample, in the calibration data of all processes


class _BackwardPasses:
    """Runs backward passes for one batch of each process, then for the next, until enough samples are done.

    The index of a sample is its position in this order; in a single process this is the order of the batches.
    """

    def __init__(self, samples: Samples, limit: GradientLimit) -> None:
        self._samples = samples
        self._processes = samples.processes
        self._limit = limit
        # Number of samples of all processes.
        self._wanted = math.inf if limit.samples is None else limit.samples
        self._predictions = 0  # of one sample, as soon as one has run

    def run(self, tick: Tick) -> None:
        """Run all passes; `tick` gets the expected number of rounds left."""
        batches = iter(self._samples)
        done = 0
        while done < self._wanted:
            with self._processes.fail_together():
                batch = next(batches, None)
                samples = self._samples.split(batch) if batch else []
            own_size = sum(sample.size for sample in samples)
            gathered = self._processes.all_gather([batch is not None, own_size])
            if not any(has_batch for has_batch, _ in gathered):
                return

            sizes = [size for _, size in gathered]
            with self._processes.fail_together():
                self._run_round(samples, done, sizes)
                done += sum(sizes)
                rounds_left = max(0, self._wanted - done) / max(1, sum(sizes))
                tick(None if rounds_left == math.inf else math.ceil(rounds_left))

    def _run_round(self, samples: Sequence[Sample], done: int, sizes: Sequence[int]) -> None:
        """Run the samples of this process; `sizes` are the numbers of samples of all processes."""
        index = done + sum(sizes[: self._processes.rank])
        parts = []
        for sample in samples:
            parts.append(_Part(sample, index))
            index += sample.size
        if not self._predictions and any(sizes):
            parts = self._run_first(parts, sizes)

        parts = [part for part in parts if part.index < self._wanted]
        for part in self._joined(parts) if self._predictions == 1 else parts:
            self._backward(part)

    def _run_first(self, parts: list[_Part], sizes: Sequence[int]) -> list[_Part]:
        """Run the first sample of all, which shows how many are needed; return what this process has left."""
        first_rank = next(rank for rank, size in enumerate(sizes) if size)
        if self._processes.rank == first_rank:
            self._predictions = self._backward(parts[0])
            parts = parts[1:]
        self._predictions = self._processes.broadcast(self._predictions, first_rank)
        needed = math.ceil(self._limit.predictions / self._predictions)
        self._wanted = max(self._wanted, needed)
        return parts

    def _joined(self, parts: Sequence[_Part]) -> Iterator[_Part]:
        """Join samples of equal shapes, so that one backward pass has some of them."""
        for start in range(0, len(parts), _SAMPLES_AT_ONCE):
            together = parts[start : start + _SAMPLES_AT_ONCE]
            samples = [part.sample for part in together]
            if fit_together(samples):
                yield _Part(self._samples.join(samples), together[0].index)
            else:
                yield from together

    def _backward(self, part: _Part) -> int:
        """Run one backward pass, and return how many predictions each of its samples has."""
        count = min(part.sample.size, self._wanted - part.index)
        objective, predictions = _objective(part.sample, part.index, int(count))
        try:
            objective.backward()
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            raise UserError(
                "The model must keep the activations that a backward pass reads, but it writes into some of them, as "
                "SPLADE models do in evaluation mode. Choose allocation='uniform' and pattern='unstructured_layer', "
                "which read no gradients."
            ) from error
        return predictions


# ---- the gradient of the predictions


def _objective(sample: Sample, first: int, count: int) -> tuple[Tensor, int]:
    """Return a number whose gradient with respect to the predictions is that of `-log p(y)`.

    It is `p - onehot(y)` for logits, and `z - y` for vectors. It is computed by hand, because cross entropy would hold
    three more tensors of this size. The predictions are freed when this returns, and the gradient after the backward
    pass of the output head.

    The seed of a target is the index of its sample in the calibration data; `first` is that of the first sample. Only
    the first `count` samples have a gradient that is not 0. Also return how many predictions each sample has, including
    those of padding.
    """
    output = sample.predict()
    predictions, keep = _checked_predictions(output, sample)
    fill_gradient = _fill_for_vectors if has_vectors(output) else _fill_for_classes
    gradient = torch.zeros_like(predictions)
    # More than 1 if the first dimension is not that of samples.
    length = max(1, len(predictions) // sample.size)
    for index in range(count):
        rows = slice(index * length, (index + 1) * length)
        keep_of_sample = None if keep is None else keep[rows]
        fill_gradient(gradient[rows], predictions[rows].detach(), keep_of_sample, first + index)
    objective = _WithGradient.apply(predictions, gradient)  # type: ignore[no-untyped-call]
    return objective, max(1, predictions[..., 0].numel() // sample.size)


def _checked_predictions(output: object, sample: Sample) -> tuple[Tensor, Tensor | None]:
    """Return the predictions of a sample and which rows are not padding; refuse those that have no gradient."""
    predictions = find_predictions(output)
    if predictions is None or not predictions.requires_grad:
        shape = "" if predictions is None else f" of shape {tuple(predictions.shape)}"
        raise UserError(
            f"forward must return predictions, since gradients are read, but a batch gave {type(output).__name__}"
            f"{shape} without logits or vectors that depend on the pruned layers. Let forward= (or calibration_step) "
            "return them, with one row for each sample or token, or choose allocation='uniform' and "
            "pattern='unstructured_layer', which read no gradients."
        )

    keep = None
    counted = predictions
    # The name selects the mask of the whole model, not that of its encoder.
    mask = fitting_mask(sample.masks, "", predictions)
    if mask:
        keep = mask.keep.to(predictions.device)
        predictions = predictions.reshape(*keep.shape, -1)
        counted = predictions[keep]
    # Minus infinity is the logit of an impossible class.
    if not (counted < math.inf).all():
        raise UserError(
            "calibration batches must give finite predictions, but those of batch "
            f"{sample.batch_index} (counted from 0) hold NaN or infinity. Check that batch, or load the model in a "
            "wider dtype (float32 or bfloat16 rather than float16)."
        )
    return predictions, keep


def _fill_for_vectors(gradient: Tensor, vectors: Tensor, keep: Tensor | None, seed: int) -> None:
    """Write `z - y` of one sample into its gradient, where `y` is drawn from N(z, I): a standard normal direction."""
    generator = torch.Generator(vectors.device).manual_seed(seed)
    gradient.normal_(generator=generator)
    if keep is not None:
        gradient[~keep] = 0


def _fill_for_classes(gradient: Tensor, logits: Tensor, keep: Tensor | None, seed: int) -> None:
    """Write `p - onehot(y)` of one sample into its gradient; labels y are drawn for the rows that are kept."""
    predictions = logits if keep is None else logits[keep]
    slopes = predictions.reshape(-1, predictions.shape[-1]).float().softmax(dim=-1)
    if len(slopes):
        generator = torch.Generator(slopes.device).manual_seed(seed)
        labels = torch.multinomial(slopes, 1, generator=generator)
        slopes.scatter_add_(1, labels, slopes.new_full(labels.shape, -1))
    slopes = slopes.to(gradient.dtype)
    if keep is None:
        gradient.copy_(slopes.view(gradient.shape))
    else:
        gradient[keep] = slopes


class _WithGradient(torch.autograd.Function):
    """Zero with a given gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return logits.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Any) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0], None


# ---- the sums


class _Input(NamedTuple):
    """The tokens that enter a layer, as the backward pass needs them."""

    product: Product
    squares: Tensor
    tokens: Tensor | None  # for layers whose hidden units are scored


class _Sums:
    """Adds up the squared inputs and gradients of each layer; called in place of each product."""

    def __init__(self, layers: Sequence[Layer], columns: Mapping[str, int]) -> None:
        self.by_layer = {layer.name: _zeros(layer, columns.get(layer.name)) for layer in layers}
        self.reached: Counter[str] = Counter()  # how often, by the name of the layer

    def __call__(self, products: list[Product], multiply: Multiply) -> Tensor:
        """Return the product, whose backward pass adds to the sums."""
        if not torch.is_grad_enabled():  # no gradient reaches this product
            return multiply()
        inputs = [self._input(product) for product in products]
        output = multiply()
        # The graph starts here; a result is no leaf, because the model may write into it.
        if not output.requires_grad:
            output = output.detach().requires_grad_().clone()
        output.register_hook(partial(self._add, inputs))
        return output

    def _input(self, product: Product) -> _Input:
        layer = product.layer
        tokens = layer.tokens(product.tokens.detach()).float()
        # A copy, because the model may write into its activations before the backward pass.
        copied = None if self.by_layer[layer.name].units is None else tokens.clone()
        return _Input(product, tokens.square(), copied)

    def _add(self, inputs: Sequence[_Input], gradient: Tensor) -> None:
        for entry in inputs:
            product = entry.product
            layer = product.layer
            total = self.by_layer[layer.name]
            outputs = layer.outputs(product.own_output(gradient)).flatten(0, -2).float()
            rows = slice(product.row, product.row + outputs.shape[1])
            squared = outputs.square()
            # Divide by all rows of the layer: this product may use only some of them.
            total.inputs.add_(torch.mv(entry.squares.t(), squared.sum(dim=1) / len(total.rows)))
            total.rows[rows].add_(squared.sum(dim=0))

            if entry.tokens is not None and total.units is not None:
                # First-order effects on the loss, of each token and each hidden unit.
                effects = torch.mm(outputs, layer.read()[rows].float()).mul_(entry.tokens)
                of_units = effects.unflatten(1, (-1, len(total.units))).sum(dim=1)
                total.units.add_(of_units.square_().sum(dim=0))
            # The tokens of other experts are zeros.
            is_reached = layer.expert is None or bool(entry.squares.any())
            self.reached[layer.name] += is_reached


def _zeros(layer: Layer, columns: int | None) -> GradientStatistics:
    d_out, d_in = layer.shape
    zeros = torch.zeros(d_in + d_out, dtype=torch.float32, device=layer.weight.device)
    units = None if columns is None else zeros.new_zeros(d_in // columns)
    return GradientStatistics(zeros[:d_in], zeros[d_in:], units)


@contextmanager
def without_gradients(model: Module) -> Iterator[None]:
    """Turn off `requires_grad` of all parameters inside this `with` block."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
