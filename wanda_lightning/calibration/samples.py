"""The calibration batches as samples that can run through the model, each with its padding."""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from wanda_lightning.calibration.cloning import clone_arguments
from wanda_lightning.calibration.error_notes import naming_batch
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.float64 import widest
from wanda_lightning.common.progress import ProgressBar
from wanda_lightning.core.placeholders import is_unloaded
from wanda_lightning.models import TokenMask, check_tokens, find_predictions, token_masks
from wanda_lightning.parallel import Processes

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Sample:
    """A calibration batch, or some of its samples, that can run through the model."""

    forward: Callable[[], object]
    predict: Callable[[], object]  # returns the logits
    batch: Any = None
    masks: tuple[TokenMask, ...] = ()
    size: int = 1  # number of samples
    batch_index: int = 0  # of the calibration batch, for messages


class Samples:
    """The calibration batches of one process, each of which is one `Sample` until it is `split`.

    `forward` runs one batch through the model (by default `forward_batch`, on the model's device), and `predict`
    returns the logits (by default the output of `forward`). `reader` names the choice that reads the batches; None if
    no choice does.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any] | None,
        forward: Callable[[Any], object] | None,
        predict: Callable[[Any], object] | None,
        processes: Processes,
        reader: object,
    ) -> None:
        if reader is not None and (
            not isinstance(batches, Iterable) or isinstance(batches, Mapping | Tensor | str)
        ):
            given = (
                "none were given" if batches is None else f"a {type(batches).__name__} was given"
            )
            raise UserError(
                f"batches must be a list of batches or a dataloader, since {reader} reads calibration data, but "
                f"{given}. Give batches, or choices that read none, such as method='magnitude'."
            )
        self._model = model
        self._processes = processes
        self._reader = reader
        self._batches: Iterable[Any] = () if reader is None or batches is None else batches
        self._forward = partial(_on_copy, forward or self._forward_on_device)
        self._predict = partial(_on_copy, predict or forward or self._forward_on_device)
        parameters = (
            each for each in model.parameters() if not isinstance(each, UninitializedParameter)
        )
        self._can_try = not any(map(is_unloaded, parameters))
        self._splits: dict[
            tuple[int, ...], bool
        ] = {}  # whether samples run alone, by the dimensions of the tensors
        self._counted = 0  # batches of this process in the latest pass
        self.total = 0  # batches of all processes, once they have run
        self.length = length_of(self._batches)

    def _forward_on_device(self, batch: Any) -> object:
        try:
            device = next(self._model.parameters()).device
            return forward_batch(self._model, map_tensors(lambda tensor: tensor.to(device), batch))
        except Exception:
            # Only now, since some models replace ids.
            if isinstance(batch, Mapping) and "input_ids" in batch:
                check_tokens(self._model, batch["input_ids"])
            raise

    def read_all(self, progress: bool) -> None:
        """Load all batches into memory; a bar counts them if their number is unknown."""
        with ProgressBar("Reading batches", self.length, progress and self.length is None) as bar:
            held = []
            for batch in self._batches:
                held.append(batch)
                bar.advance()
        self._batches = held
        self.length = len(held)

    def __iter__(self) -> Iterator[Sample]:
        """Read the batches one by one; in several processes, inside `Processes.fail_together`."""
        self._counted = 0
        for index, batch in enumerate(self._batches):
            self._counted += 1
            yield self._sample(batch, index, 1)

    def in_memory(self) -> list[Sample]:
        """Return one sample for each batch, all of which are in memory; refuse to go on without any."""
        with self._processes.fail_together():
            samples = list(self)
        self.refuse_if_empty()
        return samples

    def split(self, sample: Sample) -> list[Sample]:
        """Return the samples of a batch, each of which can run alone; the batch itself if it cannot be split."""
        batch, count = sample.batch, self._separable(sample.batch)
        size = batch_size(batch) if tensors_of(batch) and not is_even(batch) else 1
        parts = [take(batch, n, n + 1) for n in range(count)] if count != 1 else [batch]
        return [self._sample(part, sample.batch_index, size) for part in parts]

    def _separable(self, batch: Any) -> int:
        """Return the number of samples that a batch can be split into; two samples of each layout are tried."""
        count = separable_samples(batch)
        layout = tuple(tensor.ndim for tensor in tensors_of(batch))
        if count > 1 and self._can_try and layout not in self._splits:
            self._splits[layout] = run_alone(self._predict, batch)
        return count if self._splits.get(layout, True) else 1

    def join(self, samples: Sequence[Sample]) -> Sample:
        """Return one forward pass for several samples that `fit_together`."""
        batch = concatenated([sample.batch for sample in samples])
        return self._sample(batch, samples[0].batch_index, sum(sample.size for sample in samples))

    def subset(self, sample: Sample, start: int, stop: int) -> Sample:
        """Return some samples of a batch; the batch itself if it has no others."""
        whole = (start, stop) == (0, sample.size)
        return (
            sample
            if whole
            else self._sample(take(sample.batch, start, stop), sample.batch_index, stop - start)
        )

    def first_batches(self, count: int) -> list[Sample]:
        """Return the first batches, until they hold `count` samples; later passes read them again.

        A batch that cannot be split counts as one sample.
        """
        batches = iter(self._batches)
        kept = list[Sample]()
        while (
            sum(sample.size for sample in kept) < count
            and (batch := next(batches, _NONE_LEFT)) is not _NONE_LEFT
        ):
            kept.append(self._sample(batch, len(kept), self._separable(batch)))
        if not isinstance(self._batches, list):
            self._batches = chain([sample.batch for sample in kept], batches)
        return kept

    def first_samples(self, count: int) -> list[Sample]:
        """Return this process's part of the first `count` samples, which are taken from all processes in turn.

        They are the same for any number of processes if a sampler deals the samples in turn, as Lightning's does.
        """
        with self._processes.fail_together():
            found = self.first_batches(count)
        counts = self._processes.all_gather([min(count, sum(sample.size for sample in found))])
        turns = sorted((turn, rank) for rank, (own,) in enumerate(counts) for turn in range(own))
        left = sum(rank == self._processes.rank for _, rank in turns[:count])
        own = []
        for sample in found:
            if left > 0:
                own.append(self.subset(sample, 0, min(left, sample.size)))
            left -= sample.size
        return own

    def count(self) -> None:
        """Count the batches without running them; there may be none."""
        with self._processes.fail_together():
            for _ in self:
                pass
        self._sum_counts()

    def refuse_if_empty(self) -> None:
        """Count the batches that all processes have read in the latest pass, and refuse to go on without any."""
        self._sum_counts()
        if not self.total:
            raise UserError(
                f"batches must hold at least one calibration batch for {self._reader}, but there is none. Give a "
                "list or a dataloader: an iterator can be read only once."
            )

    def _sum_counts(self) -> None:
        self.total = sum(count for (count,) in self._processes.all_gather([self._counted]))

    def _sample(self, batch: Any, index: int, size: int) -> Sample:
        batch = detached(batch)
        forward, predict = (
            partial(_run, run, batch, index) for run in (self._forward, self._predict)
        )
        masks = token_masks(self._model, batch)
        return Sample(forward, predict, batch, masks, size, index)


def fit_together(samples: Sequence[Sample]) -> bool:
    """Whether all samples are entries of a first dimension with equal shapes, so that they can run as one batch."""
    batches = [sample.batch for sample in samples]
    layout = _layout(samples[0].batch)
    alike = all(is_even(batch) and _layout(batch) == layout for batch in batches)
    return alike and samples[0].size == batch_size(batches[0])


def _run(forward: Callable[[Any], object], batch: Any, index: int) -> object:
    with naming_batch(index, batch):
        return forward(batch)


def _on_copy(forward: Callable[[Any], object], batch: Any) -> object:
    """Run a batch that the model may write into, or take keys from: later passes and the caller read it again."""
    return forward(clone_arguments(batch))


_NONE_LEFT = object()


def length_of(batches: Any) -> int | None:
    """Return the number of batches; None if it is unknown, as for a DataLoader of a stream."""
    try:
        return len(batches)
    except TypeError:
        return None


def forward_batch(model: nn.Module, batch: Any) -> object:
    """Call a model on a batch.

    A mapping becomes keyword arguments, without those that the model's forward does not take. A tuple or list is
    replaced by its first element. Anything else is passed unchanged.
    """
    if isinstance(batch, Mapping):
        return model(**_accepted(model, batch))
    return model(batch[0] if isinstance(batch, tuple | list) else batch)


def _accepted(model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    parameters = inspect.signature(model.forward).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return batch
    accepted = {parameter.name for parameter in parameters}
    if not accepted & batch.keys():
        raise UserError(
            f"batches hold {sorted(batch)}, but {type(model).__name__}.forward takes {sorted(accepted)}. Give "
            "forward=, or, in a LightningModule, define calibration_step(batch)."
        )
    return {key: value for key, value in batch.items() if key in accepted}


def detached(batch: Any) -> Any:
    """Detach the tensors of a batch from their graph, which backward passes would free.

    Those that were created in inference mode, which autograd cannot save, are cloned.
    """
    found: list[bool] = []
    map_tensors(lambda each: found.append(each.requires_grad or each.is_inference()), batch)
    if not any(found):
        return batch
    return map_tensors(lambda each: each.clone() if each.is_inference() else each.detach(), batch)


def map_tensors(function: Callable[[Tensor], object], batch: Any) -> Any:
    """Apply a function to every tensor in a nesting of mappings, lists and tuples."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: map_tensors(function, value) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        values = [map_tensors(function, value) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return batch


def tensors_of(batch: Any) -> list[Tensor]:
    """Return all tensors of a batch that have at least one dimension."""
    found: list[Tensor] = []
    map_tensors(found.append, batch)
    return [tensor for tensor in found if tensor.ndim]


# Tensors to which transformers gives one row for each sample.
_ONE_ROW_EACH = ("input_ids", "inputs_embeds", "decoder_input_ids", "attention_mask", "labels")

_CHANNELS = 4  # of an image, at most


def _images(batch: Any) -> Sequence[Tensor]:
    """Return the images of a batch for a detector, such as `(images, targets)`; none for any other batch.

    They form a list of tensors (channels, height, width), and all other tensors are in lists, too.
    """
    values = (
        batch.values()
        if isinstance(batch, Mapping)
        else batch
        if isinstance(batch, tuple | list)
        else ()
    )
    if any(isinstance(value, Tensor) and value.ndim for value in values):  # then lists hold columns
        return ()
    lists = (value for value in values if isinstance(value, tuple | list))
    return next((each for each in lists if all(_is_image(image) for image in each)), ())


def _is_image(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim == 3 and len(value) <= _CHANNELS


def batch_size(batch: Any) -> int:
    """Return the number of samples in a batch.

    This is the number of images in a list, or else the most common length of the batch's tensors. Some tensors may have
    another length: `pixel_values` may have one row for each patch and `image_grid_thw` one for each image. If several
    lengths are equally common, the length of a tensor with one row for each sample (`_ONE_ROW_EACH`) decides, then the
    length of the first tensor.

    Raises:
        ValueError: If the batch has no tensor with at least one dimension.
    """
    if images := _images(batch):
        return len(images)
    lengths = Counter(len(tensor) for tensor in tensors_of(batch))
    if not lengths:
        raise UserError(
            f"batches must hold tensors, but one is of class {type(batch).__name__} without any."
        )
    common = [length for length, count in lengths.items() if count == max(lengths.values())]
    named = (
        [batch[key] for key in _ONE_ROW_EACH if key in batch] if isinstance(batch, Mapping) else []
    )
    return next((len(tensor) for tensor in tensors_of(named) if len(tensor) in common), common[0])


def is_even(batch: Any) -> bool:
    """Whether a batch can be split: all its tensors have the same length.

    It must not have a list of images, whose length is their number of channels, or a list without tensors.
    """
    lengths = {len(tensor) for tensor in tensors_of(batch)}
    return len(lengths) == 1 and not _images(batch) and not _has_column(batch)


def separable_samples(batch: Any) -> int:
    """Return the number of samples that a batch can be split into by its shapes; 1 if it cannot be split."""
    return batch_size(batch) if is_even(batch) else 1


_SAME = 0.03  # of the norm: more than rounding in bfloat16, less than what a time step changes in the next one
_CLASSES = 256  # to compare; there may be many, such as a vocabulary


@torch.no_grad()
def run_alone(predict: Callable[[Any], object], batch: Any) -> bool:
    """Whether the last two samples of a batch have the same predictions alone as together, apart from rounding.

    Time steps do not; in a causal model, the earlier one does. True if the model has no predictions, or fails anyway.
    """
    last = batch_size(batch) - 1

    def rows(start: int, stop: int) -> Tensor:
        found = find_predictions(predict(take(batch, start, stop)))
        return (
            torch.empty(0)
            if found is None
            else widest(found[..., :: 1 + found.shape[-1] // _CLASSES])
        )

    try:
        together = rows(last - 1, last + 1)
        alone = torch.cat([rows(last - 1, last), rows(last, last + 1)])
        same = together.shape == alone.shape and not bool(
            (alone - together).norm() > _SAME * together.norm()
        )
    except Exception:  # the code of a model may raise anything
        same = True
        with suppress(Exception):
            predict(batch)
            same = False
    if not same:
        log.warning(
            "each batch runs whole, as one sample: entries of its first dimension have other predictions alone than "
            "together. If it is not that of samples, give batches with samples first, and let forward= rearrange them."
        )
    return same


def _has_column(batch: Any) -> bool:
    """Whether a batch holds a list without tensors, as of one text for each sample."""
    if isinstance(batch, list | tuple) and not any(
        isinstance(each, Tensor | Mapping | list | tuple) for each in batch
    ):
        return True
    inner = (
        batch.values()
        if isinstance(batch, Mapping)
        else batch
        if isinstance(batch, list | tuple)
        else ()
    )
    return any(map(_has_column, inner))


def take(batch: Any, start: int, stop: int) -> Any:
    """Return some samples of a batch that can be split."""
    return map_tensors(lambda tensor: tensor[start:stop] if tensor.ndim else tensor, batch)


def _layout(batch: Any) -> Any:
    return map_tensors(
        lambda tensor: (tensor.dtype, tensor.shape, tensor.item() if not tensor.ndim else None),
        batch,
    )


def concatenated(batches: Sequence[Any]) -> Any:
    """Concatenate the tensors of batches with equal layouts, whose keys may be in another order."""
    first = batches[0]
    if isinstance(first, Tensor):
        return torch.cat([*batches]) if first.ndim else first
    if isinstance(first, Mapping):
        return {key: concatenated([batch[key] for batch in batches]) for key in first}
    if isinstance(first, tuple | list):
        values = [concatenated(column) for column in zip(*batches, strict=True)]
        return type(first)(*values) if hasattr(first, "_fields") else type(first)(values)
    return first
