"""The calibration batches as samples that can run through the model, each with its padding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from wanda_lightning.calibration.batches import (
    batch_size,
    concatenated,
    detached,
    forward_batch,
    have_one_layout,
    is_even,
    length_of,
    run_alone,
    separable_samples,
    take,
    tensors_of,
    to_device,
)
from wanda_lightning.calibration.error_notes import naming_batch
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.progress import ProgressBar
from wanda_lightning.core.placeholders import is_unloaded
from wanda_lightning.models import TokenMask, check_tokens, token_masks
from wanda_lightning.parallel import Processes, is_sharded


@dataclass(frozen=True, eq=False)
class Sample:
    """A calibration batch, or some of its samples, that can run through the model."""

    forward: Callable[[], object]
    predict: Callable[[], object]  # returns the logits
    batch: Any = None
    masks: tuple[TokenMask, ...] = ()
    counts: bool = True  # False if it only runs because another process runs a batch at the same time
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
        if reader is not None and (not isinstance(batches, Iterable) or isinstance(batches, Mapping | Tensor | str)):
            given = "none were given" if batches is None else f"a {type(batches).__name__} was given"
            raise UserError(
                f"batches must be a list of batches or a dataloader, since {reader} reads calibration data, but "
                f"{given}. Give batches, or choices that read none, such as method='magnitude'."
            )
        self._model, self._processes, self._reader = model, processes, reader
        self._batches: Iterable[Any] = () if reader is None or batches is None else batches
        self._forward = forward or self._forward_on_device
        self._predict = predict or self._forward
        # FSDP2 communicates in every forward pass, so all processes must run the same number of them.
        self.in_step = processes.world_size > 1 and is_sharded(model)
        parameters = (each for each in model.parameters() if not isinstance(each, UninitializedParameter))
        self._can_try = not self.in_step and not any(map(is_unloaded, parameters))
        self._splits: dict[tuple[int, ...], bool] = {}  # whether samples run alone, by the dimensions of the tensors
        self._counted = 0  # batches of this process in the latest pass
        self.total = 0  # batches of all processes, once they have run
        self.length = length_of(self._batches)

    def _forward_on_device(self, batch: Any) -> object:
        try:
            return forward_batch(self._model, to_device(batch, next(self._model.parameters()).device))
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
        self._batches, self.length = held, len(held)

    def __iter__(self) -> Iterator[Sample]:
        """Read the batches one by one; in several processes, inside `Processes.fail_together`."""
        batches: Iterable[tuple[Any, bool]] = ((batch, True) for batch in self._batches)
        if self.in_step:
            batches = _pad_to_equal(self._batches, self._processes)
        self._counted = 0
        for index, (batch, counts) in enumerate(batches):
            self._counted += counts
            yield replace(self._sample(batch, index, 1), counts=counts)

    def hold(self) -> list[Sample]:
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
        count, layout = separable_samples(batch), tuple(tensor.ndim for tensor in tensors_of(batch))
        if count > 1 and self._can_try and layout not in self._splits:
            self._splits[layout] = run_alone(self._predict, batch)
        return count if self._splits.get(layout, True) else 1

    def join(self, samples: Sequence[Sample]) -> Sample:
        """Return one forward pass for several samples that `fit_together`."""
        batch = concatenated([sample.batch for sample in samples])
        return self._sample(batch, samples[0].batch_index, sum(sample.size for sample in samples))

    def part(self, sample: Sample, start: int, stop: int) -> Sample:
        """Return some samples of a batch; the batch itself if it has no others."""
        whole = (start, stop) == (0, sample.size)
        return sample if whole else self._sample(take(sample.batch, start, stop), sample.batch_index, stop - start)

    def first(self, count: int) -> list[Sample]:
        """Return the first batches, until they hold `count` samples; later passes read them again.

        A batch that cannot be split counts as one sample.
        """
        batches, kept = iter(self._batches), list[Sample]()
        while sum(sample.size for sample in kept) < count and (batch := next(batches, _NONE_LEFT)) is not _NONE_LEFT:
            kept.append(self._sample(batch, len(kept), self._separable(batch)))
        if not isinstance(self._batches, list):
            self._batches = chain([sample.batch for sample in kept], batches)
        return kept

    def head(self, count: int) -> list[Sample]:
        """Return this process's part of the first `count` samples, which are taken from all processes in turn.

        They are the same for any number of processes if a sampler deals the samples in turn, as Lightning's does. If
        FSDP2 communicates in each pass, samples that do not count follow until all processes have equally many.
        """
        with self._processes.fail_together():
            found = self.first(count)
        counts = self._processes.all_gather([min(count, sum(sample.size for sample in found))])
        turns = sorted((turn, rank) for rank, (own,) in enumerate(counts) for turn in range(own))
        left, own = sum(rank == self._processes.rank for _, rank in turns[:count]), []
        for sample in found:
            if left > 0:
                own.append(self.part(sample, 0, min(left, sample.size)))
            left -= sample.size
        if self.in_step:
            padded = [batch for batch, _ in _pad_to_equal([sample.batch for sample in own], self._processes)]
            own += [replace(self._sample(batch, 0, 1), counts=False) for batch in padded[len(own) :]]
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
        forward, predict = (partial(_run, run, batch, index) for run in (self._forward, self._predict))
        masks = token_masks(self._model, batch)
        return Sample(forward, predict, batch, masks, True, size, index)


def fit_together(samples: Sequence[Sample]) -> bool:
    """Whether all samples are entries of a first dimension with equal shapes, so that they can run as one batch."""
    batches = [sample.batch for sample in samples]
    return have_one_layout(batches) and samples[0].size == batch_size(batches[0])


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
