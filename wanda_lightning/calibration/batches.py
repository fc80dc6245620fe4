"""Count the samples of a batch, split it, join batches, and move them to a device.

A batch is a tensor, or a nesting of mappings, lists and tuples with tensors and other values.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from wanda_lightning.calibration.trees import (
    all_tensors,
    clone_arguments,
    map_tensors,
    tensors_of,
)
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.float64 import widest
from wanda_lightning.models import find_predictions

log = logging.getLogger(__name__)

BatchFunction = Callable[[Any], object]
"""Runs a batch through a model."""


def batch_size(batch: Any) -> int:
    """Return the number of samples in a batch.

    This is the number of images in a list, the length of `input_ids`, or else the most common length of the batch's
    tensors. Some tensors may have another length: `pixel_values` may have one row for each patch and `image_grid_thw`
    one for each image.

    Raises:
        ValueError: If the batch has no tensor with at least one dimension.
    """
    images = _images(batch)
    if images:
        return len(images)

    tensors = tensors_of(batch)
    if isinstance(batch, Mapping) and "input_ids" in batch:
        tensors = tensors_of(batch["input_ids"])
    if not tensors:
        raise UserError(
            f"batches must hold tensors, but one is of class {type(batch).__name__} without any."
        )
    ((length, _),) = Counter(map(len, tensors)).most_common(1)
    return length


def is_even(batch: Any) -> bool:
    """Whether a batch can be split: all its tensors have the same length.

    It must not have a list of images, whose length is their number of channels, or a list without tensors.
    """
    lengths = {len(tensor) for tensor in tensors_of(batch)}
    return len(lengths) == 1 and not _images(batch) and not _has_column(batch)


def separable_samples(batch: Any) -> int:
    """Return the number of samples that a batch can be split into by its shapes; 1 if it cannot be split."""
    return batch_size(batch) if is_even(batch) else 1


def _images(batch: Any) -> Sequence[Tensor]:
    """Return the list of images in a batch for a detector, such as `(images, targets)`; none for any other batch."""
    for entry in _entries(batch):
        if isinstance(entry, tuple | list) and all(map(_is_image, entry)):
            return entry
    return ()


def _is_image(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim == 3


def _has_column(batch: Any) -> bool:
    """Whether a batch holds a list without tensors, such as one text for each sample."""
    entries = _entries(batch)
    is_column = not any(isinstance(entry, Tensor | Mapping | list | tuple) for entry in entries)
    if isinstance(batch, list | tuple) and is_column:
        return True
    return any(map(_has_column, entries))


def _entries(batch: Any) -> Sequence[Any]:
    if isinstance(batch, Mapping):
        return list(batch.values())
    return batch if isinstance(batch, tuple | list) else ()


_SAME = 0.03  # of the norm: more than rounding in bfloat16, less than what a time step changes in the next one
_CLASSES = 256  # to compare; there may be many, such as a vocabulary


@torch.no_grad()
def run_alone(predict: BatchFunction, batch: Any) -> bool:
    """Whether the last two samples of a batch have the same predictions alone as together, apart from rounding.

    Time steps do not; in a causal model, the earlier one does. True if the model has no predictions, or fails anyway.
    """
    is_same = True
    try:
        is_same = _predicts_the_same(predict, batch)
    except Exception:  # the code of a model may raise anything
        with suppress(Exception):
            predict(clone_arguments(batch))
            is_same = False  # only parts of the batch fail
    if not is_same:
        log.warning(
            "each batch runs whole, as one sample: entries of its first dimension have other predictions alone than "
            "together. If it is not that of samples, give batches with samples first, and let forward= rearrange them."
        )
    return is_same


def _predicts_the_same(predict: BatchFunction, batch: Any) -> bool:
    """Whether the last two samples of a batch have the same predictions alone as together."""

    def predictions(start: int, stop: int) -> Tensor:
        samples = clone_arguments(take(batch, start, stop))  # the model may write into them
        logits = find_predictions(predict(samples))
        if logits is None:
            return torch.empty(0)
        return widest(logits[..., :: 1 + logits.shape[-1] // _CLASSES])

    end = batch_size(batch)
    together = predictions(end - 2, end)
    alone = torch.cat([predictions(end - 2, end - 1), predictions(end - 1, end)])
    if together.shape != alone.shape:
        return False
    # NaN counts as the same, since no comparison with it is true.
    return not (alone - together).norm() > _SAME * together.norm()


def take(batch: Any, start: int, stop: int) -> Any:
    """Return some samples of a batch that can be split."""
    return map_tensors(lambda tensor: tensor[start:stop] if tensor.ndim else tensor, batch)


def concatenated(batches: Sequence[Any]) -> Any:
    """Concatenate the tensors of batches with equal layouts, whose keys may be in another order."""

    def joined(*tensors: Tensor) -> Tensor:
        return torch.cat(tensors) if tensors[0].ndim else tensors[0]

    return map_tensors(joined, *batches)


def layout(batch: Any) -> Any:
    """Return a batch with the dtype and the shape in place of each tensor, and the value of a scalar."""
    return map_tensors(
        lambda tensor: (tensor.dtype, tensor.shape, None if tensor.ndim else tensor.item()), batch
    )


def to_device(batch: Any, device: torch.device) -> Any:
    """Move the tensors of a batch to a device."""
    return map_tensors(lambda tensor: tensor.to(device), batch)


def detached(batch: Any) -> Any:
    """Detach the tensors of a batch from their graph, which backward passes would free.

    Those that were created in inference mode, which autograd cannot save, are cloned.
    """
    tensors = all_tensors(batch)
    if not any(tensor.requires_grad or tensor.is_inference() for tensor in tensors):
        return batch
    return map_tensors(
        lambda tensor: tensor.clone() if tensor.is_inference() else tensor.detach(), batch
    )
