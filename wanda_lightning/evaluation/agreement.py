"""Compare the predictions of a pruned model with those of the dense one."""

import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import ceil, sqrt
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import Module, functional as F

from wanda_lightning.common.float64 import widened
from wanda_lightning.common.text_features import as_encoded
from wanda_lightning.core.losses import row_divergences
from wanda_lightning.evaluation.perplexity import predicted_tokens
from wanda_lightning.models import find_predictions, has_classes, head_within
from wanda_lightning.training.predictions import gives_predictions

_LOGITS_AT_ONCE = 2**22  # that are compared, 16 MiB in float32
_GROUPS = 10  # of samples, for the standard error of a percentile
_PERCENTILE_OF = 100  # predictions, at least


class AfterBatch(Protocol):
    """A function to call after each batch."""

    def __call__(self, batch: Any, index: int, data: int) -> None:
        """Take a batch that has just run, its index, and the number of its data set."""


class _Stored(NamedTuple):
    """The dense predictions for the first samples of a batch, on the CPU."""

    rows: Tensor
    are_head_inputs: bool  # else they are the predictions themselves
    outputs: int  # numbers in a prediction


@dataclass
class _LastCall:
    """Output of the last forward pass, and the inputs of its output head."""

    output: object = None
    head_inputs: tuple[Any, ...] = ()

    def forget(self) -> None:
        """Let the next forward pass have their memory."""
        self.output = None
        self.head_inputs = ()


class Agreement:
    """Compares the predictions of a pruned model with those of the dense one on the same batches.

    Predictions of classes are compared by the Kullback-Leibler divergence `KL(dense || pruned)`, and by whether the
    most likely class is the same (Dutta et al., "Accuracy is Not All You Need", NeurIPS 2024); vectors by the cosine
    between them. Of a text, the predictions of its tokens count, except those of padding.

    The dense predictions are stored on the CPU, those of a language model as the inputs of its output head. On each
    data set they have at most `most_bytes`: samples that no longer fit, after the first one, are not compared. A copy
    of the head's parameters comes on top. Models with another number of outputs are not compared, with a warning.
    """

    def __init__(self, most_bytes: int = 2 * 2**30) -> None:
        self._most_bytes = most_bytes
        self._dense: dict[tuple[int, int], _Stored] = {}  # by data set and batch
        self._bytes: dict[int, int] = defaultdict(int)  # by data set
        self._head: dict[str, Tensor] = {}  # parameters of the dense output head
        # By data set and metric: a tensor for each sample.
        self._values: dict[int, dict[str, list[Tensor]]] = {}

    @contextmanager
    def storing(self, model: Module) -> Iterator[AfterBatch]:
        """Yield a function to call after each batch that the dense model runs in this block."""
        head = head_within(model)
        with _watching(model, head) as last:

            @torch.no_grad()
            def store(batch: Any, index: int, data: int) -> None:
                predictions = find_predictions(last.output)
                if predictions is not None and self._bytes[data] < self._most_bytes:
                    self._store(predictions, last.head_inputs, head, batch, (data, index))
                last.forget()

            yield store

    @contextmanager
    def comparing(self, model: Module) -> Iterator[AfterBatch]:
        """Yield a function to call after each batch that the pruned model runs in this block."""
        self._values = defaultdict(lambda: defaultdict(list))
        head = head_within(model)
        with _watching(model, None) as last:

            @torch.no_grad()
            def compare(batch: Any, index: int, data: int) -> None:
                stored = self._dense.get((data, index))
                if stored is not None:
                    self._compare(last.output, stored, head, batch, data)
                last.forget()

            yield compare

    def _store(
        self,
        predictions: Tensor,
        head_inputs: tuple[Any, ...],
        head: Module | None,
        batch: Any,
        key: tuple[int, int],
    ) -> None:
        is_counted = _counted(predictions, batch)
        rows = predictions.flatten(0, -2)
        are_head_inputs = False
        if head is not None and len(head_inputs) == 1:
            (inputs,) = head_inputs
            same_shape = inputs.shape[:-1] == is_counted.shape
            if same_shape and gives_predictions(head, inputs.flatten(0, -2), rows):
                rows = inputs.flatten(0, -2)
                are_head_inputs = True
                if not self._head:
                    self._head = {n: p.detach().cpu().clone() for n, p in head.named_parameters()}

        # The first samples that fit.
        data, _ = key
        rows_left = (self._most_bytes - self._bytes[data]) // rows[0].nbytes
        ends = _rows_by_sample(is_counted).cumsum(0)
        number = int((ends <= rows_left).sum())
        if not self._bytes[data]:
            number = max(1, number)
        chosen = rows[_positions(is_counted[:number])].cpu()
        self._bytes[data] += chosen.nbytes
        if len(chosen):
            self._dense[key] = _Stored(chosen, are_head_inputs, predictions.shape[-1])

    def _compare(
        self, output: object, stored: _Stored, head: Module | None, batch: Any, data: int
    ) -> None:
        predictions = find_predictions(output)
        assert predictions is not None
        rows = predictions.flatten(0, -2)
        if rows.shape[1] != stored.outputs:
            warnings.warn(
                f"The predictions are not compared: the dense model has {stored.outputs:,} outputs, and the other one "
                f"{rows.shape[1]:,}.",
                stacklevel=2,
            )
            return
        is_counted = _counted(predictions, batch)
        positions = _positions(is_counted)[: len(stored.rows)]
        dense_rows = stored.rows.to(rows.device)
        self._head = {name: value.to(rows.device) for name, value in self._head.items()}
        measure = _of_classes if has_classes(output) else _of_vectors
        size = max(1, _LOGITS_AT_ONCE // rows.shape[-1])
        parts = []
        for start in range(0, len(positions), size):
            part = slice(start, start + size)
            dense_part = dense_rows[part]
            if stored.are_head_inputs:
                assert head is not None
                dense_part = functional_call(head, self._head, (dense_part,))
            parts.append(measure(widened(rows[positions[part]]), widened(dense_part)))

        numbers = _rows_by_sample(is_counted).tolist()
        for name in parts[0]:
            values = torch.cat([part[name] for part in parts]).cpu()
            for number in filter(None, numbers):
                sample = values[:number]
                values = values[number:]
                if len(sample):
                    self._values[data][name].append(sample)

    def metrics(self, data: int = 0) -> dict[str, float]:
        """Return the mean of each metric on a data set, a percentile of the divergence, and the number of predictions.

        Keys that end in `_stderr` are standard errors, of which there are none without two samples, and none if all
        values are equal.
        """
        metrics: dict[str, float] = {}
        for name, samples in self._values.get(data, {}).items():
            values = torch.cat(samples)
            metrics[name] = float(values.mean())
            error = _error_of_mean(samples)
            if error:
                metrics[f"{name}_stderr"] = error
            if name == "kl_divergence":
                metrics |= _percentile_of(samples)
            metrics["predictions"] = len(values)
        return metrics


@contextmanager
def _watching(model: Module, head: Module | None) -> Iterator[_LastCall]:
    """Yield the output of each forward pass of a model in this block, and the inputs of its head."""
    last = _LastCall()

    def keep_inputs(module: Module, args: tuple[Any, ...]) -> None:
        last.head_inputs = args

    def keep_output(module: Module, args: object, output: object) -> None:
        last.output = as_encoded(model, output)

    with ExitStack() as hooks:
        if head is not None:
            hooks.enter_context(head.register_forward_pre_hook(keep_inputs))
        hooks.enter_context(model.register_forward_hook(keep_output))
        try:
            yield last
        finally:
            last.forget()


def _counted(predictions: Tensor, batch: Any) -> Tensor:
    """Return which predictions count: for a text, those of tokens in the window, as for its perplexity; else all."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if ids is not None and ids.shape == predictions.shape[:-1]:
        return predicted_tokens(ids, batch.get("attention_mask")).roll(-1, dims=1)
    return torch.ones(predictions.shape[:-1], dtype=torch.bool, device=predictions.device)


def _positions(is_counted: Tensor) -> Tensor:
    """Return the rows that count, in the matrix of all predictions."""
    return is_counted.flatten().nonzero().squeeze(1)


def _rows_by_sample(is_counted: Tensor) -> Tensor:
    return is_counted.reshape(len(is_counted), -1).sum(dim=1)


def _of_classes(logits: Tensor, dense: Tensor) -> Mapping[str, Tensor]:
    is_same = logits.argmax(dim=-1) == dense.argmax(dim=-1)
    return {"kl_divergence": row_divergences(logits, dense), "same_top": is_same.to(logits.dtype)}


def _of_vectors(vectors: Tensor, dense: Tensor) -> Mapping[str, Tensor]:
    return {"cosine": F.cosine_similarity(vectors, dense)}


def _error_of_mean(samples: Sequence[Tensor]) -> float:
    """Return the standard error of the mean of all values; 0 for a single sample.

    Samples are independent, but the tokens of a window are not. So the mean is a ratio of two sums over samples: of
    their values, and of their sizes.
    """
    if len(samples) < 2:
        return 0.0
    sums = torch.stack([sample.sum() for sample in samples])
    counts = torch.tensor([len(sample) for sample in samples])
    residuals = sums - sums.sum() / counts.sum() * counts
    return sqrt(float(residuals.var()) * len(samples)) / int(counts.sum())


def _percentile_of(samples: Sequence[Tensor]) -> dict[str, float]:
    """Return the 99th percentile of the divergence, and its standard error from groups of samples, of enough values."""
    values = torch.cat([*samples])
    if len(values) < _PERCENTILE_OF:
        return {}
    name = "kl_divergence_p99"
    metrics = {name: _percentile(values)}
    groups = [samples[start::_GROUPS] for start in range(_GROUPS)]
    if all(sum(map(len, group)) >= _PERCENTILE_OF for group in groups):
        percentiles = torch.tensor([_percentile(torch.cat([*group])) for group in groups])
        metrics[f"{name}_stderr"] = float(percentiles.std()) / sqrt(_GROUPS)
    return metrics


def _percentile(values: Tensor) -> float:
    """Return the 99th percentile: the smallest value that 99 % of all do not exceed."""
    return float(values.kthvalue(ceil(0.99 * len(values))).values)
