"""The calibration batches as samples that can run through the model, each with its padding."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

from torch import Tensor
from torch.nn import Module
from torch.nn.parameter import UninitializedParameter

from wanda_lightning.calibration.batches import (
    BatchFunction,
    batch_size,
    concatenated,
    detached,
    is_even,
    layout,
    run_alone,
    separable_samples,
    take,
    to_device,
)
from wanda_lightning.calibration.error_notes import naming_batch
from wanda_lightning.calibration.trees import clone_arguments, tensors_of
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.text_features import SENTENCES, as_encoded, reads_texts, text_features
from wanda_lightning.core.placeholders import is_unloaded
from wanda_lightning.models import TokenMask, check_tokens, token_masks
from wanda_lightning.parallel import Processes


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
        model: Module,
        batches: Iterable[Any] | None,
        forward: BatchFunction | None,
        predict: BatchFunction | None,
        processes: Processes,
        reader: object,
    ) -> None:
        self._batches: Iterable[Any] = ()
        if reader is not None:
            self._batches = _tokenized(model, _checked(batches, reader))
        self._model = model
        self.processes = processes
        self._reader = reader
        self._forward = forward or self._forward_on_device
        self._predict = predict or self._forward

        # Without its weights in memory, a model cannot try whether samples run alone.
        self.can_try = not any(
            is_unloaded(parameter)
            for parameter in model.parameters()
            if not isinstance(parameter, UninitializedParameter)
        )
        # Whether samples run alone, by the dimensions of the tensors.
        self._splits: dict[tuple[int, ...], bool] = {}
        self._counted = 0  # batches of this process in the latest pass
        self.total = 0  # batches of all processes, once they have run
        self.length = length_of(self._batches)

    def _forward_on_device(self, batch: Any) -> object:
        try:
            device = next(self._model.parameters()).device
            return forward_batch(self._model, to_device(batch, device))
        except Exception as error:
            # Only now, since some models read other batches, or replace ids.
            if not tensors_of(batch):
                raise UserError(
                    f"batches must hold tensors, but the model was given {batch!r:.80}, without any. Tokenize texts; "
                    "for pairs of texts and a CrossEncoder, give [model.preprocess(pairs)]."
                ) from error
            if isinstance(batch, Mapping) and "input_ids" in batch:
                check_tokens(self._model, batch["input_ids"])
            raise

    def read_all(self) -> None:
        """Load all batches into memory."""
        self._batches = list(self._batches)
        self.length = len(self._batches)

    def __iter__(self) -> Iterator[Sample]:
        """Read the batches one by one; in several processes, inside `Processes.fail_together`."""
        self._counted = 0
        for index, batch in enumerate(self._batches):
            self._counted += 1
            yield self._sample(batch, index, 1)

    def in_memory(self) -> list[Sample]:
        """Return one sample for each batch, all of which are in memory; refuse to go on without any."""
        with self.processes.fail_together():
            samples = list(self)
        self.refuse_if_empty()
        return samples

    def split(self, sample: Sample) -> list[Sample]:
        """Return the samples of a batch, each of which can run alone; the batch itself if it cannot be split."""
        batch = sample.batch
        count = self._separable(batch)
        # Images in a list are several samples that run together; an even batch that runs whole counts as one.
        size = batch_size(batch) if tensors_of(batch) and not is_even(batch) else 1
        parts = [batch]
        if count != 1:
            parts = [take(batch, index, index + 1) for index in range(count)]
        return [self._sample(part, sample.batch_index, size) for part in parts]

    def first_of(self, sample: Sample) -> Sample:
        """Return the first sample of a batch, judged by its shapes; the batch itself if it cannot be split."""
        if separable_samples(sample.batch) == 1:
            return sample
        return self._sample(take(sample.batch, 0, 1), sample.batch_index, 1)

    def _separable(self, batch: Any) -> int:
        """Return the number of samples that a batch can be split into; two samples of each layout are tried."""
        count = separable_samples(batch)
        dimensions = tuple(tensor.ndim for tensor in tensors_of(batch))
        if count > 1 and self.can_try and dimensions not in self._splits:
            self._splits[dimensions] = run_alone(self._predict, batch)
        return count if self._splits.get(dimensions, True) else 1

    def join(self, samples: Sequence[Sample]) -> Sample:
        """Return one forward pass for several samples that `fit_together`."""
        batch = concatenated([sample.batch for sample in samples])
        return self._sample(batch, samples[0].batch_index, sum(sample.size for sample in samples))

    def subset(self, sample: Sample, start: int, stop: int) -> Sample:
        """Return some samples of a batch; the batch itself if it has no others."""
        if (start, stop) == (0, sample.size):
            return sample
        return self._sample(take(sample.batch, start, stop), sample.batch_index, stop - start)

    def first_batches(self, count: int) -> list[Sample]:
        """Return the first batches, until they hold `count` samples; later passes read them again.

        A batch that cannot be split counts as one sample.
        """
        batches = iter(self._batches)
        first = []
        for index, batch in enumerate(batches):
            first.append(self._sample(batch, index, self._separable(batch)))
            if sum(sample.size for sample in first) >= count:
                break
        if not isinstance(self._batches, list):
            self._batches = chain([sample.batch for sample in first], batches)
        return first

    def first_sample(self) -> Sample | None:
        """Return the first sample, in the first process that has any; None in the others."""
        with self.processes.fail_together():
            batches = [batch for batch in self.first_batches(1) if batch.size]
        has_any = [bool(number) for (number,) in self.processes.all_gather([len(batches)])]
        if not batches or has_any.index(True) != self.processes.rank:
            return None
        return self.subset(batches[0], 0, 1)

    def common_sample(self) -> Sample | None:
        """Return the first sample of all processes, in each of them; None if there is none."""
        sample = self.first_sample()
        for source in range(self.processes.world_size):
            batch = self.processes.broadcast(None if sample is None else sample.batch, source)
            if batch is not None:
                device = next(self._model.parameters()).device
                return sample or self._sample(to_device(batch, device), 0, 1)
        return None

    def count(self) -> None:
        """Count the batches without running them; there may be none."""
        with self.processes.fail_together():
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
        self.total = sum(count for (count,) in self.processes.all_gather([self._counted]))

    def _sample(self, batch: Any, index: int, size: int) -> Sample:
        batch = detached(batch)
        forward = partial(_run, self._forward, batch, index)
        predict = partial(_run, self._predict, batch, index)
        return Sample(forward, predict, batch, token_masks(self._model, batch), size, index)


def _checked(batches: object, reader: object) -> Iterable[Any]:
    """Return the batches; refuse what is no collection of batches, such as a single one."""
    if isinstance(batches, Iterable) and not isinstance(batches, Mapping | Tensor | str):
        return batches
    problem = "none were given" if batches is None else f"a {type(batches).__name__} was given"
    raise UserError(
        f"batches must be a list of batches or a dataloader, since {reader} reads calibration data, but "
        f"{problem}. Give batches; prune with method='magnitude' reads none."
    )


def _tokenized(model: Module, batches: Iterable[Any]) -> Iterable[Any]:
    """Return calibration batches; for a list of texts, batches that the model makes of them, in their order."""
    if not isinstance(batches, Sequence) or not batches or not isinstance(batches[0], str):
        return batches
    if not reads_texts(model):
        raise UserError(
            f"batches must hold tensors, but they are texts, and {type(model).__name__} has no method `tokenize`, as "
            "models of sentence-transformers do. Tokenize the texts."
        )
    if callable(getattr(model, "rank", None)):
        raise UserError(
            f"batches for a CrossEncoder must hold pairs of texts, but batches[0] is the text {batches[0]!r:.80}. Give "
            "[model.preprocess(pairs)]."
        )
    return [
        text_features(model, batches[start : start + SENTENCES])
        for start in range(0, len(batches), SENTENCES)
    ]


def fit_together(samples: Sequence[Sample]) -> bool:
    """Whether all samples are entries of a first dimension with equal shapes, so that they can run as one batch."""
    batches = [sample.batch for sample in samples]
    first = layout(batches[0])
    are_alike = all(is_even(batch) and layout(batch) == first for batch in batches)
    return are_alike and samples[0].size == batch_size(batches[0])


def _run(forward: BatchFunction, batch: Any, index: int) -> object:
    """Run a copy of a batch: the model may write into it, or take keys from it, and later passes read it again."""
    with naming_batch(index, batch):
        return forward(clone_arguments(batch))


def length_of(batches: Any) -> int | None:
    """Return the number of batches; None if it is unknown, as for a DataLoader of a stream."""
    try:
        return len(batches)
    except TypeError:
        return None


def forward_batch(model: Module, batch: Any) -> object:
    """Call a model on a batch.

    A mapping becomes keyword arguments, without those that the model's forward does not take. A tuple or list is
    replaced by its first element. Anything else is passed unchanged, and so is a mapping for a model that reads texts
    and has no argument with one of its names.
    """
    if isinstance(batch, Mapping):
        arguments = inspect.signature(model.forward).parameters
        takes_all = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in arguments.values())
        accepted = {key: value for key, value in batch.items() if takes_all or key in arguments}
        if not reads_texts(model) or batch.keys() & arguments.keys():
            return model(**accepted)
    output = model(batch[0] if isinstance(batch, tuple | list) else batch)
    return as_encoded(model, output)
