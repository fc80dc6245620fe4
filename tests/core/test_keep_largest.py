"""Every implementation keeps exactly what a stable sort of each group would keep."""

import pytest
import torch
from support import reference
from support.layers import rng
from support.reference import assert_keeps

from wanda_lightning.core.keep_largest import keep_largest, keep_largest_of_each


def integers(groups, size, levels):
    return torch.randint(0, levels, (groups, size), generator=rng(size))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("levels", [1, 3, 10_000])
@pytest.mark.parametrize(
    ("groups", "size"),
    # Groups of up to 16 scores are compared in pairs, 65,536 groups at a time; larger ones are selected from.
    [(20, 15), (1025, 15), (70_000, 4), (20, 16), (1025, 16), (20, 17), (1025, 17), (2, 5000)],
)
def test_keep_largest_of_any_shape_type_and_layout(groups, size, levels, dtype):
    scores = integers(groups, size, levels).to(dtype)
    layouts = [
        scores,
        scores.t().contiguous().t(),
        scores.repeat_interleave(2, dim=1)[:, ::2],
        torch.cat([scores, scores], dim=1)[:, size:],
    ]
    for count in (0, 1, size // 2, size - 1, size):
        expected = reference.keep_largest(reference.array(scores), count)
        for layout in layouts:
            assert_keeps(keep_largest(layout, count), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [4, 17])
def test_groups_may_share_memory(size, dtype):
    scores = integers(1, size, levels=3).to(dtype).expand(20, size)
    assert_keeps(keep_largest(scores, 3), reference.keep_largest(reference.array(scores), 3))


def test_keep_largest_with_infinite_scores():
    scores = torch.tensor([[float("inf"), 1.0, float("inf"), 0.0]])
    assert keep_largest(scores, 1).tolist() == [[False, False, True, False]]


@pytest.mark.parametrize("size", [4, 40])
def test_each_group_may_keep_another_number(size):
    scores = integers(200, size, levels=5).float()
    counts = torch.arange(200) % (size + 1)
    keep = keep_largest_of_each(scores, counts)
    for group, kept, count in zip(scores, keep, counts.tolist(), strict=True):
        assert_keeps(kept[None], reference.keep_largest(group[None].numpy(), count))
