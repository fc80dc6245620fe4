"""Turn calibration batches into forward passes through the model."""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from functools import partial
from itertools import chain
from numbers import Number
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from wanda_lightning.calibration.error_notes import naming_batch
from wanda_lightning.calibration.parking import MakeParking, Parking
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.progress import ProgressBar
from wanda_lightning.models import TokenMask, check_tokens, token_masks
from wanda_lightning.parallel import Processes, is_sharded


class Sample(NamedTuple):
    """The forward pass of one sample, or of a batch that cannot be split.

    Attributes:
        predict: Runs it and returns the logits.
        masks: Its padding.
        size: 1, or the number of samples of a batch that cannot be split or that `join` returned.
        batch: What enters the model.
        batch_index: Index of the calibration batch, for messages.
    """

    predict: Callable[[], object]
    masks: tuple[TokenMask, ...]
    size: int
    batch: Any
    batch_index: int


class CalibrationBatches:
    """The calibration batches of one process as forward passes, each with its padding.

    Args:
        model: The model.
        batches: The batches.
        forward: Runs one batch through the model; by default `forward_batch`, on the model's device.
        predict: Runs one batch and returns the logits; by default `forward`.
        processes: All processes that calibrate together.
        reader: The choice that reads the batches, for messages; None if no choice does.
        make_parking: Keeps the activations of one batch while it waits at a unit.

    Raises:
        ValueError: If the batches are needed but `batches` is not a collection of batches.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any] | None,
        forward: Callable[[Any], object] | None,
        predict: Callable[[Any], object] | None,
        processes: Processes,
        reader: object,
        make_parking: MakeParking = Parking,
    ) -> None:
        if reader is not None and (not isinstance(batches, Iterable) or isinstance(batches, Mapping | Tensor | str)):
            given = "none were given" if batches is None else f"a {type(batches).__name__} was given"
            raise UserError(
                f"batches must be a list of batches or a dataloader, since {reader} reads calibration data, but "
                f"{given}. Give batches, or choices that read none, such as method='magnitude'."
            )
        self._model, self._processes, self._reader = model, processes, reader
        self.make_parking = make_parking
        self._batches: Iterable[Any] = () if reader is None or batches is None else batches
        self._forward = forward or self._forward_on_device
        self._predict = predict or self._forward
        # FSDP2 communicates in every forward pass, so all processes must run the same number of them.
        self._padded_to_equal = processes.world_size > 1 and is_sharded(model)
        # The padding of each batch that was run; None for a batch that runs but does not count.
        self.masks: list[tuple[TokenMask, ...] | None] = []
        self.total = 0  # number of batches of all processes; known after `refuse_if_empty`
        # Number of batches of this process; None if it is unknown.
        self.length = len(self._batches) if isinstance(self._batches, Sized) else None

    def _forward_on_device(self, batch: Any) -> object:
        device = next(self._model.parameters()).device
        try:
            return forward_batch(self._model, map_tensors(partial(_to_device, device), batch))
        except Exception:
            if isinstance(batch, Mapping) and "input_ids" in batch:  # only now, since some models replace ids
                check_tokens(self._model, batch["input_ids"])
            raise

    def read_all(self, progress: bool) -> None:
        """Load all batches into memory; a bar counts them if their number is unknown."""
        with ProgressBar("Reading batches", self.length, progress and self.length is None) as bar:
            held = []
            for batch in self._batches:
                held.append(batch)
                bar.advance()
                bar.show("")
        self._batches, self.length = held, len(held)

    def samples(self) -> Iterator[list[Sample]]:
        """Yield the samples of each batch; each batch adds an entry to `masks`."""
        self.masks.clear()
        for index, batch in enumerate(self._batches):
            self.masks.append(token_masks(self._model, batch))
            if any(tensor.is_inference() for tensor in _tensors(batch)):  # autograd cannot save them
                batch = map_tensors(_outside_inference, batch)
            size = batch_size(batch) if any(True for _ in _tensors(batch)) else 1
            parts = [take(batch, n, n + 1) for n in range(size)] if is_even(batch) else [batch]
            yield [self._sample(self._predict, part, index, size // len(parts)) for part in parts]

    def join(self, samples: Sequence[Sample]) -> Sample:
        """Return one forward pass for several samples that `fit_together`."""
        batch = _concatenated([sample.batch for sample in samples])
        return self._sample(self._predict, batch, samples[0].batch_index, sum(sample.size for sample in samples))

    def _sample(self, run: Callable[[Any], object], batch: Any, index: int, size: int) -> Sample:
        return Sample(partial(_run, run, batch, index), token_masks(self._model, batch), size, batch, index)

    def first(self, samples: int, held_out: int) -> tuple[list[tuple[Sample, int]], list[Sample]]:
        """Keep the first batches in memory, until they have so many samples, and hold out every `held_out`-th sample.

        Returns:
            The forward pass of each batch, with the number of its samples that are not held out, which are its first;
            and the predictions for those that are. A batch that cannot be split counts as one sample.
        """
        batches, seen = iter(self._batches), 0
        kept: list[Any] = []
        used: list[tuple[Sample, int]] = []
        apart: list[Sample] = []
        while seen < samples and (batch := next(batches, _NONE_LEFT)) is not _NONE_LEFT:
            index, size = len(kept), batch_size(batch) if is_even(batch) else 1
            count = size - (seen + size) // held_out + seen // held_out
            used.append((self._sample(self._forward, batch, index, size), count))
            if count < size:
                part = take(batch, count, size) if count else batch
                apart.append(self._sample(self._predict, part, index, size - count))
            kept.append(batch)
            seen += size
        if not isinstance(self._batches, list):
            self._batches = chain(kept, batches)
        return used, apart

    def head(self, samples: int) -> list[Sample]:
        """Return the forward passes of this process for exactly the first samples of all processes, taken in turn.

        So they are the same for any number of processes if a sampler deals the samples in turn, as Lightning's does. A
        batch that cannot be split counts as one sample.
        """
        with self._processes.fail_together():
            found = [sample for sample, _ in self.first(samples, sys.maxsize)[0]]
        counts = self._processes.all_gather([min(samples, sum(sample.size for sample in found))])
        turns = sorted((turn, rank) for rank, (count,) in enumerate(counts) for turn in range(count))
        left, own = sum(rank == self._processes.rank for _, rank in turns[:samples]), []
        for sample in found:
            if 0 < left < sample.size:
                sample = self._sample(self._forward, take(sample.batch, 0, left), sample.batch_index, left)
            own += [sample] if left > 0 else []
            left -= sample.size
        return own

    def __iter__(self) -> Iterator[Callable[[], object]]:
        """Yield one forward pass for each batch; each adds an entry to `masks`."""
        batches: Iterable[tuple[Any, bool]] = ((batch, True) for batch in self._batches)
        if self._padded_to_equal:
            batches = _pad_to_equal(self._batches, self._processes)
        self.masks.clear()
        for index, (batch, counts) in enumerate(batches):
            self.masks.append(token_masks(self._model, batch) if counts else None)
            yield partial(_run, self._forward, batch, index)

    def count(self) -> None:
        """Count the batches without running them; there may be none."""
        for _ in self:
            pass
        self.total = self._total()

    def refuse_if_empty(self) -> None:
        """Count the batches of all processes.

        Raises:
            ValueError: If there are none.
        """
        self.total = self._total()
        if not self.total:
            raise UserError(
                f"batches must hold at least one calibration batch for {self._reader}, but there is none. Give a "
                "list or a dataloader: an iterator can be read only once."
            )

    def _total(self) -> int:
        total = torch.tensor(sum(mask is not None for mask in self.masks))
        self._processes.all_reduce_sum([total])
        return int(total)


def _run(forward: Callable[[Any], object], batch: Any, index: int) -> object:
    with naming_batch(index, batch):
        return forward(batch)


_NONE_LEFT = object()


def _pad_to_equal(batches: Iterable[Any], processes: Processes) -> Iterator[tuple[Any, bool]]:
    """Yield equally many batches in every process: its own, which count, then repetitions of its last, which do not.

    A process without any batch repeats a batch of another process.
    """
    iterator = iter(batches)
    last: Any = _NONE_LEFT
    while True:
        with processes.fail_together():
            batch = next(iterator, _NONE_LEFT)
        holder = processes.all_reduce_min(processes.world_size if batch is _NONE_LEFT else processes.rank)
        if holder == processes.world_size:
            return
        if last is _NONE_LEFT and processes.all_reduce_min(batch is not _NONE_LEFT) == 0:
            last = processes.broadcast(batch if processes.rank == holder else None, holder)
        last = last if batch is _NONE_LEFT else batch
        yield last, batch is not _NONE_LEFT


def forward_batch(model: nn.Module, batch: Any) -> object:
    """Call a model on a batch.

    A mapping becomes keyword arguments, without those that the model's forward does not take. A tuple or list is
    replaced by its first element. Anything else is passed unchanged.

    Raises:
        ValueError: If the batch is text, a number or a NumPy array, or the model cannot be called with it.
    """
    if isinstance(batch, Mapping):
        return model(**_accepted(model, batch))
    if isinstance(batch, tuple | list):
        _refuse_more_arguments(model, batch)
        batch = batch[0]
    if isinstance(batch, str | bytes | Number) or type(batch).__module__ == "numpy":
        raise UserError(
            f"batches must hold tensors, or mappings or tuples of tensors, but one is of class {type(batch).__name__}. "
            "Convert it to tensors, or give forward=."
        )
    return model(batch)


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


def _refuse_more_arguments(model: nn.Module, batch: tuple[Any, ...] | list[Any]) -> None:
    """Refuse a tuple for a model whose forward needs more than its first element."""
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*batch[:1])
    except TypeError as error:
        needed = [name for name, parameter in signature.parameters.items() if parameter.default is parameter.empty]
        raise UserError(
            f"batches are tuples or lists of {len(batch)} elements, and the model gets the first, but "
            f"{type(model).__name__}.forward needs {', '.join(needed)}. Give mappings with these names, or forward=."
        ) from error


def _to_device(device: torch.device, tensor: Tensor) -> Tensor:
    # A model outside of inference mode cannot write into a tensor that was created in inference mode.
    return _outside_inference(tensor).to(device)


def _outside_inference(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor


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


def _tensors(batch: Any) -> Iterator[Tensor]:
    """Yield all tensors of a batch that have at least one dimension."""
    if isinstance(batch, Tensor):
        if batch.ndim:
            yield batch
    elif isinstance(batch, Mapping | list | tuple):
        for value in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(value)


# Tensors to which transformers gives one row for each sample.
_ONE_ROW_EACH = ("input_ids", "inputs_embeds", "decoder_input_ids", "attention_mask", "labels")


def batch_size(batch: Any) -> int:
    """Return the number of samples in a batch.

    This is the most common length of its tensors. Some tensors may have another length: `pixel_values` may have one row
    for each patch and `image_grid_thw` one for each image. If several lengths are equally common, the length of a
    tensor with one row for each sample (`_ONE_ROW_EACH`) decides, then the length of the first tensor.

    Raises:
        ValueError: If the batch has no tensor with at least one dimension.
    """
    lengths = Counter(len(tensor) for tensor in _tensors(batch))
    if not lengths:
        raise UserError(f"batches must hold tensors, but one is of class {type(batch).__name__} without any.")
    common = [length for length, count in lengths.items() if count == max(lengths.values())]
    named = [batch[key] for key in _ONE_ROW_EACH if key in batch] if isinstance(batch, Mapping) else []
    return next((len(tensor) for tensor in _tensors(named) if len(tensor) in common), common[0])


def is_even(batch: Any) -> bool:
    """Whether a batch can be split: all its tensors have the same length, and it has no lists without tensors."""
    return len({len(tensor) for tensor in _tensors(batch)}) == 1 and not _has_column(batch)


def _has_column(batch: Any) -> bool:
    """Whether a batch holds a list without tensors, as of one text for each sample."""
    if isinstance(batch, list | tuple) and not any(isinstance(each, Tensor | Mapping | list | tuple) for each in batch):
        return True
    inner = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    return any(map(_has_column, inner))


def take(batch: Any, start: int, stop: int) -> Any:
    """Return some samples of a batch that can be split."""
    return map_tensors(lambda tensor: tensor[start:stop] if tensor.ndim else tensor, batch)


def fit_together(samples: Sequence[Sample]) -> bool:
    """Whether the tensors of all samples have equal shapes, so that they can run as one batch."""
    first = _layout(samples[0].batch)
    return all(is_even(sample.batch) and _layout(sample.batch) == first for sample in samples)


def _layout(batch: Any) -> Any:
    return map_tensors(lambda tensor: (tensor.dtype, tensor.shape, tensor.item() if not tensor.ndim else None), batch)


def _concatenated(batches: Sequence[Any]) -> Any:
    """Concatenate the tensors of batches with equal layouts."""
    first = batches[0]
    if isinstance(first, Tensor):
        return torch.cat([*batches]) if first.ndim else first
    if isinstance(first, Mapping):
        return {key: _concatenated([batch[key] for batch in batches]) for key in first}
    if isinstance(first, tuple | list):
        values = [_concatenated(column) for column in zip(*batches, strict=True)]
        return type(first)(*values) if hasattr(first, "_fields") else type(first)(values)
    return first
