"""Every implementation keeps exactly what a stable sort of each group would keep."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import reference
from support.scores import assert_keeps, non_contiguous_views, score_matrices

from wanda_lightning.core.keep_largest import keep_largest, keep_largest_of_each


@given(score_matrices(), st.data())
def test_keep_largest_is_a_stable_sort(scores, data):
    count = data.draw(st.integers(0, scores.shape[1]))
    keep = keep_largest(scores, count)
    assert (keep.sum(dim=1) == count).all()
    assert_keeps(keep, reference.keep_largest(scores.numpy(), count))


@pytest.mark.parametrize("size", [15, 16, 17])  # pairwise comparison up to 16, a selection above
@pytest.mark.parametrize("levels", [1, 3, 10_000])
@pytest.mark.parametrize("groups", [20, 1025])  # up to 1024, a sort instead of the comparison
def test_keep_largest_on_both_sides_of_the_small_group(groups, size, levels):
    scores = torch.randint(0, levels, (groups, size), generator=torch.Generator().manual_seed(size)).float()
    for count in (0, 1, 5, size - 1, size):
        expected = reference.keep_largest(scores.numpy(), count)
        for view in [scores, *non_contiguous_views(scores)]:
            assert_keeps(keep_largest(view, count), expected)


@pytest.mark.parametrize(("groups", "size"), [(5, 8), (5, 24), (2000, 8), (2, 66_000)])
def test_keep_largest_of_rows_that_share_memory(groups, size):
    scores = torch.rand(size, generator=torch.Generator().manual_seed(0)).expand(groups, size)
    assert_keeps(keep_largest(scores, 3), reference.keep_largest(scores.numpy(), 3))


def test_keep_largest_of_more_groups_than_are_compared_at_once():
    scores = torch.randint(0, 4, (70_000, 4), generator=torch.Generator().manual_seed(0)).float()
    assert_keeps(keep_largest(scores, 2), reference.keep_largest(scores.numpy(), 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("groups", "size"), [(10, 8), (10, 24), (2000, 8)])
def test_keep_largest_of_any_float_type(dtype, groups, size):
    scores = torch.rand(groups, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert_keeps(keep_largest(scores, 5), reference.keep_largest(reference.array(scores), 5))


def _large_groups():
    generator = torch.Generator().manual_seed(0)
    size = 66_000  # from 65536 on, a sample tells where the threshold is
    sampled = torch.arange(size) % 61 == 0
    others = (~sampled).nonzero()[:, 0]
    yield torch.rand(size, generator=generator)
    yield torch.rand(size, generator=generator, dtype=torch.float64)
    yield torch.randint(0, 4, (size,), generator=generator).float()
    yield torch.ones(size)
    yield torch.arange(size).float()
    # The sample does not represent the others.
    yield torch.rand(size, generator=generator) + (~sampled).float()
    yield torch.rand(size, generator=generator) + sampled.float()
    yield torch.rand(size, generator=generator).masked_fill_(~sampled, torch.inf)
    yield torch.ones(size).index_fill_(0, torch.cat([sampled.nonzero()[:, 0], others])[:33_000], 0.0)
    below = (1.0 + torch.rand(size, generator=generator)).index_fill_(0, torch.tensor(610), 1.0)
    yield below.index_fill_(0, others[:2000], 0.0)


def test_keep_largest_of_a_large_group():
    for scores in _large_groups():
        both = torch.stack([scores, scores.flip(0)])
        for count in (1, 600, 33_000, 65_500, 65_999):
            assert_keeps(keep_largest(both, count), reference.keep_largest(both.numpy(), count))


def test_keep_largest_with_infinite_scores():
    scores = torch.tensor([[float("inf"), 1.0, float("inf"), 0.0]])
    assert keep_largest(scores, 1).tolist() == [[False, False, True, False]]


@pytest.mark.parametrize("size", [4, 40])
def test_each_group_may_keep_another_number(size):
    scores = torch.randint(0, 5, (200, size), generator=torch.Generator().manual_seed(0)).float()
    counts = torch.arange(200) % (size + 1)
    keep = keep_largest_of_each(scores, counts)
    assert torch.equal(keep.sum(dim=1), counts)
    for group, expected, count in zip(scores, keep, counts.tolist(), strict=True):
        assert_keeps(expected[None], reference.keep_largest(group[None].numpy(), count))
