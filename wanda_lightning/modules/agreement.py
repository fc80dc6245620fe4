"""How near the predictions of a pruned model are to those of the dense one."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from math import ceil, sqrt
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, functional as F

from wanda_lightning.common.float64 import widened
from wanda_lightning.core.losses import row_divergences
from wanda_lightning.models import find_predictions, has_classes, own_head
from wanda_lightning.modules.perplexity import predicted_tokens
from wanda_lightning.training.predictions import DenseTarget, stored

_MOST_BYTES = 2 * 2**30  # of dense predictions
_AT_ONCE = 2**22  # logits that are compared at the same time, 16 MiB in float32
_GROUPS = 10  # of samples, for the standard error of a percentile

_Values = Mapping[str, Tensor]  # of each measure, one for each row of predictions


class Agreement:
    """Compares the predictions of a pruned model with those of the dense one on the same batches.

    The dense model runs first, and then the pruned one, each in a block of `watching`; after each batch, `add` stores
    or compares what the model has predicted.

    Predictions of classes are compared by the Kullback-Leibler divergence `KL(dense || pruned)`, and by whether the
    most likely class is the same (Dutta et al., "Accuracy is Not All You Need", NeurIPS 2024); vectors by the cosine
    between them. Of a text, the predictions of its tokens count, except those of padding.

    The dense predictions are stored on the CPU, those of a language model as the inputs of its output head, with a copy
    of the head. Together they have at most 2 GiB: batches that no longer fit are not compared.
    """

    def __init__(self) -> None:
        self._dense: dict[object, DenseTarget] = {}
        self._bytes = 0
        # By data set and measure: a tensor for each sample.
        self._values: dict[int, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
        self._head: Module | None = None  # the copy
        self._stores = True
        self._model_head: Module | None = None
        self._output: object = None
        self._head_inputs: tuple[Any, ...] = ()

    @contextmanager
    def watching(self, model: Module, is_dense: bool) -> Iterator[None]:
        """See what a model predicts in this block."""

        def keep_output(module: Module, args: object, output: object) -> None:
            self._output = output

        def keep_inputs(module: Module, args: tuple[Any, ...]) -> None:
            self._head_inputs = args

        self._stores = is_dense
        self._values.clear()  # of another pruned model
        head = next(filter(None, map(own_head, model.modules())), None)
        with ExitStack() as hooks:
            hooks.enter_context(model.register_forward_hook(keep_output))
            if head is not None and is_dense:
                hooks.enter_context(head.register_forward_pre_hook(keep_inputs))
            self._model_head = head
            hooks.callback(setattr, self, "_model_head", None)
            yield

    @torch.no_grad()
    def add(self, batch: Any, index: int, data: int = 0) -> None:
        """Store or compare what the model has predicted for a batch, which has this index in a data set."""
        output = self._output
        inputs = self._head_inputs
        self._output = None
        self._head_inputs = ()
        predictions = find_predictions(output)
        if predictions is None:
            return

        is_counted = _counted(predictions, batch)
        rows = predictions[is_counted]
        if self._stores:
            head_inputs = None
            if len(inputs) == 1 and inputs[0].shape[:-1] == is_counted.shape:
                head_inputs = inputs[0][is_counted]
            self._store(stored(rows, head_inputs, self._model_head), (data, index))
        elif (data, index) in self._dense:
            values = _compare(rows, self._dense[data, index], has_classes(output))
            numbers = is_counted.reshape(len(is_counted), -1).sum(dim=1).tolist()
            for name, of_rows in values.items():
                samples = of_rows.split(numbers)
                self._values[data][name] += [sample for sample in samples if len(sample)]

    def _store(self, target: DenseTarget, key: object) -> None:
        if self._bytes + target.rows.nbytes > _MOST_BYTES:
            return
        self._bytes += target.rows.nbytes
        if target.head is None:
            self._dense[key] = DenseTarget(target.rows.cpu(), None)
            return
        if self._head is None:
            self._head = deepcopy(target.head)  # the model's own may be pruned, or trained
        self._dense[key] = DenseTarget(target.rows.cpu(), self._head)

    def metrics(self, data: int = 0) -> dict[str, float]:
        """Return the mean of each measure, a percentile of the divergence, and the number of predictions.

        A name with `_stderr` is that of an error; there is none for a single sample. Samples are independent, but the
        tokens of a window are not, so that the errors are those of means over samples.
        """
        metrics = {}
        for name, samples in self._values[data].items():
            values = torch.cat(samples)
            metrics[name] = float(values.mean())
            metrics |= _error(name, [float(sample.mean()) for sample in samples])
            if name == "kl_divergence":
                percentile = f"{name}_p99"
                metrics[percentile] = _percentile(values)
                number = min(_GROUPS, len(samples))
                groups = [torch.cat(samples[start::number]) for start in range(number)]
                metrics |= _error(percentile, list(map(_percentile, groups)))
            metrics["predictions"] = len(values)
        return metrics


def _counted(predictions: Tensor, batch: Any) -> Tensor:
    """Return which predictions count: for a text, those of tokens in the window, as for its perplexity; else all."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if ids is not None and ids.shape == predictions.shape[:-1]:
        return predicted_tokens(ids, batch.get("attention_mask")).roll(-1, dims=1)
    return torch.ones(predictions.shape[:-1], dtype=torch.bool, device=predictions.device)


def _compare(rows: Tensor, dense: DenseTarget, are_classes: bool) -> _Values:
    """Compare rows of predictions with the dense ones, some at a time."""
    dense_rows = DenseTarget(dense.rows.to(rows.device), dense.head).predictions()
    measures = _of_classes if are_classes else _of_vectors
    size = max(1, _AT_ONCE // rows.shape[-1])
    parts = []
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        parts.append(measures(widened(rows[part]), widened(dense_rows(part))))
    return {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}


def _of_classes(logits: Tensor, dense: Tensor) -> _Values:
    is_same = logits.argmax(dim=-1) == dense.argmax(dim=-1)
    return {"kl_divergence": row_divergences(logits, dense), "same_top": is_same.to(logits.dtype)}


def _of_vectors(vectors: Tensor, dense: Tensor) -> _Values:
    return {"cosine": F.cosine_similarity(vectors, dense)}


def _percentile(values: Tensor) -> float:
    """Return the 99th percentile: the smallest value that 99 % of all do not exceed."""
    return float(values.kthvalue(ceil(0.99 * len(values))).values)


def _error(name: str, values: Sequence[float]) -> dict[str, float]:
    """Return the standard error of the mean of independent values, if there are two."""
    if len(values) < 2:
        return {}
    return {f"{name}_stderr": float(torch.tensor(values).std()) / sqrt(len(values))}
