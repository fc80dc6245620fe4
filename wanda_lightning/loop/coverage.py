"""Notes on how much of a model is pruned."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from wanda_lightning.common.grouping import grouped
from wanda_lightning.common.wording import quantity
from wanda_lightning.models import Inventory, SkippedMatrix, SkipReason

_ENOUGH_COVERAGE = 0.8  # fraction of the weights that a user would expect to be pruned
_SHOWN_REASONS = 3


class Note(NamedTuple):
    """A sentence for the report; a warning is also logged."""

    text: str
    is_warning: bool = True


def unfit_layers(inventory: Inventory) -> Iterator[Note]:
    """Name the layers that the pattern does not fit."""
    unfit = inventory.skipped_for(SkipReason.PATTERN)
    if unfit:
        yield Note(
            f"the pattern does not fit {quantity(len(unfit), 'layer')}, {unfit[0].name} largest ({unfit[0].detail}): "
            "left dense"
        )


def low_coverage(inventory: Inventory, dense: Mapping[str, SkippedMatrix] = {}) -> Iterator[Note]:
    """Warn if many weights are not pruned, apart from embeddings, stems, heads and what the user left out.

    `dense` holds the layers of the inventory that turned out to stay dense.
    """
    left_out = [matrix for matrix in inventory.skipped if not matrix.reason.is_expected]
    pruned = 0
    for layer in inventory.layers:
        if layer.name in dense:
            left_out.append(dense[layer.name])
        else:
            pruned += layer.size
    total = pruned + _size(left_out)
    if pruned >= _ENOUGH_COVERAGE * total:
        return

    by_reason = grouped(left_out, lambda matrix: matrix.detail)
    largest_first = sorted(by_reason.items(), key=lambda item: -_size(item[1]))
    texts = []
    for reason, matrices in largest_first[:_SHOWN_REASONS]:
        more = f" and {len(matrices) - 1} more" if len(matrices) > 1 else ""
        texts.append(f"{matrices[0].name}{more}, {_size(matrices):,} weights: {reason}")
    yield Note(
        f"only {pruned / total:.0%} of the weights besides embeddings, stem and head are in pruned layers; the largest "
        f"parts left out are {'; '.join(texts)}"
    )


def _size(matrices: Sequence[SkippedMatrix]) -> int:
    return sum(matrix.size for matrix in matrices)
